"""Ranks, devices, data, the training loop, files: how a run runs. Knows no channel."""
