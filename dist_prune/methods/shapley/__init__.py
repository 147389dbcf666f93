"""Shapley values of channels: what each contributes to accuracy, over coalitions of the others."""

from dist_prune.methods.shapley.method import Shapley

__all__ = ["Shapley"]
