"""Pairs of consecutive layers: a child and what truly feeds it, each in groups of neighbouring channels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, HookPoint, Layer
from dist_prune.pruning.hooks.consumers import ChannelPoint, FindPoints, consumers, producers
from dist_prune.pruning.plan.weight_blocks import Indices

Parts = tuple[Indices, ...]
Number = Callable[[Layer, bool], tuple[int, bool]]  # layer, of its filters (else inputs) -> groups, whether exactly so


@dataclass(frozen=True)
class LayerPair:
    """A child layer and where its own channels and its parent's are read.

    Attributes:
        child: the layer whose weight (out, in, ...) is divided into blocks.
        rows, columns: groups of its output and of its input channels.
        above, x: where the child's channels are read, and the groups' columns there.
        below, y: where the parent's are read; ``y[g]`` are the columns there of the inputs ``columns[g]``.
    """

    child: str
    rows: Parts
    columns: Parts
    above: HookPoint
    x: Parts
    below: HookPoint
    y: Parts


def layer_pairs(
    graph: DependencyGraph, wanted: Callable[[str], bool], number: Number, consumed: bool,
    parent_of: Callable[[DependencyGraph, Layer], str | None] | None = None,
) -> list[LayerPair]:  # fmt: skip
    """The pairs of every plain convolution and linear layer but those that see the image, in the layers' order.

    The parent of a child in a plain chain is the layer before it, read at its raw output; behind a sum, a
    concatenation, a depthwise layer or whatever else mixes layers, it is the tensor that enters the child.

    Args:
        wanted: whether a child layer is to be scored.
        number: how many groups.
        consumed: read outputs where they are consumed (behind norm and activation) wherever one layer feeds one.
        parent_of: the layer to be read as the parent instead; where it is not the one producer of what enters the
            child, its first raw channels stand for the child's inputs.
    """
    out, entering, leaving = [], _by_layer(graph, consumers), _by_layer(graph, producers)
    for name, layer in graph.layers.items():
        feeding = entering.get(name, [])
        if layer.kind not in ("conv", "linear") or layer.groups != 1 or not feeding or not wanted(name):
            continue
        rows = contiguous_groups(layer.width_out, *number(layer, True), name)
        above, x = _above(graph, layer, rows, leaving.get(name, []) if consumed else [])
        numbered = parent_of(graph, layer) if parent_of is not None else None
        group, point = feeding[0]
        whole = len(feeding) == 1 and _whole(point)
        single = whole and _one_producer(graph, group)
        if numbered is not None and not (single and group.name == numbered):
            columns = y = contiguous_groups(layer.width_in, *number(layer, False), name)
            below = _out(graph, numbered)
        elif whole:
            y = contiguous_groups(group.width, *number(layer, False), name)
            columns = _positions(point.coupling, y)
            plain = single and not consumed
            below = _out(graph, group.name) if plain else point.point
            y = y if plain else columns
        else:
            columns = y = contiguous_groups(layer.width_in, *number(layer, False), name)
            below = point.point
        out.append(LayerPair(name, rows, columns, above, x, below, y))
    return out


def contiguous_groups(width: int, count: int, exactly: bool, layer: str) -> Parts:
    """``width`` channels in ``count`` equal runs; where it need not be exact, the largest divisor not above it.

    Raises:
        PruneError: where an exact number does not divide the width.
    """
    if exactly and width % count:
        fitting = [n for n in range(1, width + 1) if width % n == 0]
        raise PruneError(f"{layer}: {width} channels cannot be split into {count} equal groups; possible: {fitting}")
    while width % count:
        count -= 1
    size = width // count
    return tuple(tuple(range(start, start + size)) for start in range(0, width, size))


def _by_layer(graph: DependencyGraph, of: FindPoints) -> dict[str, list[tuple[ChannelGroup, ChannelPoint]]]:
    found: dict[str, list[tuple[ChannelGroup, ChannelPoint]]] = {}
    for group in graph.groups:
        for point in of(graph, group):
            found.setdefault(point.point.layer, []).append((group, point))
    return found


def _whole(point: ChannelPoint) -> bool:
    """Whether a layer's input or output holds no channels of other groups."""
    return len(point.coupling.index) == point.point.width


def _one_producer(graph: DependencyGraph, group: ChannelGroup) -> bool:
    return len(group.producers) == 1 and not any(graph.layers[name].depthwise for name in group.layers)


def _positions(coupling: Coupling, parts: Parts) -> Parts:
    """Groups of a group's channels as groups of the positions they take in a layer."""
    return tuple(tuple(sorted(coupling.positions(part))) for part in parts)


def _above(
    graph: DependencyGraph, layer: Layer, rows: Parts, made: Sequence[tuple[ChannelGroup, ChannelPoint]]
) -> tuple[HookPoint, Parts]:
    """Where the child's own channels are read: raw, or at the first layer that consumes what it makes and nothing
    else."""
    if len(made) == 1 and _one_producer(graph, made[0][0]):
        for point in consumers(graph, made[0][0]):
            if _whole(point):
                return point.point, _positions(point.coupling, rows)
    return _out(graph, layer.name), rows


def _out(graph: DependencyGraph, name: str) -> HookPoint:
    layer = graph.layers[name]
    return HookPoint(name, name, layer.width_out, layer.kind, False)
