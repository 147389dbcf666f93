"""Plans: what goes, by name."""
