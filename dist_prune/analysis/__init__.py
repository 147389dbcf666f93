"""What is looked at beside a run."""
