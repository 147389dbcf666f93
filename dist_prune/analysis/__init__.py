"""Analyses of a run that are no stages of it."""
