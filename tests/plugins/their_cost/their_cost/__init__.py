"""A cost of a third party: the memory of all feature maps."""

from collections.abc import Mapping

from dist_prune import Cost, DependencyGraph


def feature_map_bytes(graph: DependencyGraph, kept: Mapping[str, int]) -> int:
    """Bytes of the outputs of convolutions and linear layers for one image, in float32."""
    widths = graph.widths(kept)
    layers = ((name, layer) for name, layer in graph.layers.items() if layer.kind in ("conv", "linear"))
    return sum(4 * widths[name][1] * layer.positions for name, layer in layers)


COST = Cost("their_memory", feature_map_bytes, "bytes of feature maps", "feature maps (B)", "k")
