"""Pairs of consecutive layers: a child and the parent that feeds it, each in groups of neighbouring channels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, HookPoint, Layer
from dist_prune.pruning.hooks.consumers import ChannelPoint, FindPoints, consumers, producers
from dist_prune.pruning.plan.weight_blocks import Indices

Parts = tuple[Indices, ...]
GroupCount = Callable[[Layer, bool], tuple[int, bool]]  # layer, of its filters (else inputs) -> number, whether exact


@dataclass(frozen=True)
class LayerPair:
    """A child layer, and where its own channels and its parent's are read.

    Attributes:
        child: name of the layer whose weight (out, in, ...) is divided into blocks.
        rows: groups of its output channels.
        columns: groups of its input channels.
        above: the hook point at which the child's channels are read.
        x: positions at ``above`` of each group of ``rows``.
        below: the hook point at which the parent's channels are read.
        y: positions at ``below`` of each group of ``columns``.
    """

    child: str
    rows: Parts
    columns: Parts
    above: HookPoint
    x: Parts
    below: HookPoint
    y: Parts


def layer_pairs(
    graph: DependencyGraph,
    is_scored: Callable[[str], bool],
    group_count: GroupCount,
    consumed: bool,
    parent_of: Callable[[DependencyGraph, Layer], str | None] | None = None,
) -> list[LayerPair]:
    """List the pairs of all plain convolutions and linear layers except those that read the image.

    In a plain chain the parent of a child is the layer before it, read at its raw output. After a sum, a
    concatenation, a depthwise layer or anything else that mixes layers, it is the tensor that enters the child.

    Args:
        graph: of the dense network.
        is_scored: child layer -> whether it is to be scored.
        group_count: (layer, True for its filters or False for its inputs) -> (number of groups, whether it is exact).
        consumed: read outputs where they are consumed (after norm and activation), if one layer feeds one.
        parent_of: (graph, child) -> name of the layer to be read as the parent instead, or None. If that layer is
            not the one producer of the child's input, its first raw channels stand for the child's inputs.

    Returns:
        The pairs, in the order of the layers.

    Raises:
        PruneError: an exact number of groups does not divide the width.
    """
    pairs = []
    entering = _points_by_layer(graph, consumers)
    leaving = _points_by_layer(graph, producers)
    for name, layer in graph.layers.items():
        feeding = entering.get(name, [])
        if layer.kind not in ("conv", "linear") or layer.groups != 1 or not feeding or not is_scored(name):
            continue
        rows = contiguous_groups(layer.width_out, *group_count(layer, True), name)
        above, x = _above(graph, layer, rows, leaving.get(name, []) if consumed else [])
        numbered = parent_of(graph, layer) if parent_of is not None else None
        group, point = feeding[0]
        one_group = len(feeding) == 1 and _is_whole(point)
        single = one_group and _has_one_producer(graph, group)
        if numbered is not None and not (single and group.name == numbered):
            columns = y = contiguous_groups(layer.width_in, *group_count(layer, False), name)
            below = output_of(graph, numbered)
        elif one_group:
            y = contiguous_groups(group.width, *group_count(layer, False), name)
            columns = _positions_of(point.coupling, y)
            plain = single and not consumed
            below = output_of(graph, group.name) if plain else point.point
            y = y if plain else columns
        else:
            columns = y = contiguous_groups(layer.width_in, *group_count(layer, False), name)
            below = point.point
        pairs.append(LayerPair(name, rows, columns, above, x, below, y))
    return pairs


def contiguous_groups(width: int, count: int, exactly: bool, layer: str) -> Parts:
    """Split ``width`` channels into ``count`` equal runs of neighbours.

    Args:
        width: number of channels.
        count: number of groups.
        exactly: refuse a number that does not divide the width; otherwise take the largest divisor below it.
        layer: name for the error.

    Raises:
        PruneError: an exact number does not divide the width.
    """
    if exactly and width % count:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        raise PruneError(f"{layer}: {width} channels cannot be split into {count} equal groups; possible: {divisors}")
    while width % count:
        count -= 1
    size = width // count
    return tuple(tuple(range(start, start + size)) for start in range(0, width, size))


def _points_by_layer(graph: DependencyGraph, of: FindPoints) -> dict[str, list[tuple[ChannelGroup, ChannelPoint]]]:
    points: dict[str, list[tuple[ChannelGroup, ChannelPoint]]] = {}
    for group in graph.groups:
        for point in of(graph, group):
            points.setdefault(point.point.layer, []).append((group, point))
    return points


def _is_whole(point: ChannelPoint) -> bool:
    """Whether a layer's input or output holds no channels of other groups."""
    return len(point.coupling.index) == point.point.width


def _has_one_producer(graph: DependencyGraph, group: ChannelGroup) -> bool:
    return len(group.producers) == 1 and not any(graph.layers[name].depthwise for name in group.layers)


def _positions_of(coupling: Coupling, parts: Parts) -> Parts:
    """Positions in a layer of each of the parts into which a group's channels are divided."""
    return tuple(tuple(sorted(coupling.positions(part))) for part in parts)


def _above(
    graph: DependencyGraph, layer: Layer, rows: Parts, produced: Sequence[tuple[ChannelGroup, ChannelPoint]]
) -> tuple[HookPoint, Parts]:
    """Where the child's own channels are read: raw, or at the first layer that consumes its output and nothing else."""
    if len(produced) == 1 and _has_one_producer(graph, produced[0][0]):
        for point in consumers(graph, produced[0][0]):
            if _is_whole(point):
                return point.point, _positions_of(point.coupling, rows)
    return output_of(graph, layer.name), rows


def output_of(graph: DependencyGraph, name: str) -> HookPoint:
    """The raw output of a layer."""
    layer = graph.layers[name]
    return HookPoint(name, name, layer.width_out, layer.kind, False)
