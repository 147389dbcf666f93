"""Redundancy graphs: filters whose feature maps hash alike are redundant; innermost k-cores are thinned out."""

from dist_prune.methods.graph.method import Graph

__all__ = ["Graph"]
