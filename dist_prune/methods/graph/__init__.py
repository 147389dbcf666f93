"""Redundancy graphs: of filters whose feature maps hash alike, k-core decomposition keeps one."""

from dist_prune.methods.graph.method import Graph

__all__ = ["Graph"]
