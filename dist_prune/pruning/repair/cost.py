"""What a repair costs, from the sizes of the layers: known before it starts."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.repair.repaired_layers import MOST_COLUMNS
from dist_prune.pruning.repair.second_moments import SecondMoments


@dataclass(frozen=True)
class RepairCost:
    """The work of ``least_squares``.

    Attributes:
        layers: number of layers that are solved for.
        forward: MACs per image of one pass of both networks.
        moments: MACs per image of the products of inputs and errors.
        table_bytes: size of the largest layer's tables on each rank.
        blocks: layers whose inputs are solved for in several blocks.
    """

    layers: int
    forward: int
    moments: int
    table_bytes: int
    blocks: int

    def text(self, images: int) -> str:
        """One line for people.

        Args:
            images: number of images.
        """
        blocks = f"; {self.blocks} wide layers in blocks" if self.blocks else ""
        return (
            f"{self.layers} layers, {images:,} images: {images * self.forward / 1e9:,.1f} G MACs forward, "
            f"{images * self.moments / 1e9:,.1f} G for second moments, tables of up to {self.table_bytes / 1e6:,.1f} MB"
            f"{blocks}"
        )


def repair_cost(graph: DependencyGraph, kept: Mapping[str, int], layers: Container[str] | None = None) -> RepairCost:
    """Compute the cost of a repair.

    Args:
        graph: of the dense network.
        kept: group -> number of channels that are left; absent groups keep all.
        layers: the layers that are repaired; None: all convolutions and linear layers, which is the most.
    """
    widths = graph.widths(kept)
    count = forward = moments = table = blocks = 0
    for name, layer in graph.layers.items():
        if layer.kind not in ("conv", "linear"):
            continue
        narrow_in, narrow_out = widths[name]
        groups = narrow_out if layer.depthwise else layer.groups
        forward += layer.positions * layer.kernel * (layer.width_in // layer.groups) * layer.width_out
        if not narrow_out:  # its block is gone
            continue
        columns, outputs = narrow_in // groups * layer.kernel, narrow_out // groups
        forward += layer.positions * columns * narrow_out
        if layers is not None and name not in layers:
            continue
        count += 1
        solved = columns if groups > 1 else min(columns, MOST_COLUMNS)
        blocks += solved < columns
        moments += (layer.places or layer.positions) * groups * columns * (solved + outputs)
        table = max(table, SecondMoments.nbytes(groups, solved, outputs))
    return RepairCost(count, forward, moments, table, blocks)
