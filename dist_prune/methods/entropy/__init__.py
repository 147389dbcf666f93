"""Interpretable ranking: filters of a layer go one after another, the one first that the others tell most about."""

from dist_prune.methods.entropy.method import Entropy

__all__ = ["Entropy"]
