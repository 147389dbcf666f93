"""Sensitivity Pruner: masks learned next to a single-shot target, group after group, with surgery in between."""

from dist_prune.methods.sensitivity.method import Sensitivity

__all__ = ["Sensitivity"]
