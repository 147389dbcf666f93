"""MINT: blocks of weights between groups of filters go where the conditional mutual information is small."""

from dist_prune.methods.mint.method import Mint

__all__ = ["Mint"]
