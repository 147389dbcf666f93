"""Pairs of consecutive layers: a child and what truly feeds it, each in groups of neighbouring channels."""

from collections.abc import Callable
from dataclasses import dataclass

from dist_prune.errors import PruneError
from dist_prune.pruning.blocks import Indices
from dist_prune.pruning.channels import ChannelGroup, Channels, Coupling, Layer, Site

Parts = tuple[Indices, ...]
Number = Callable[[Layer, bool], tuple[int, bool]]  # layer, of its filters (else inputs) -> groups, whether exactly so


@dataclass(frozen=True)
class Pair:
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
    above: Site
    x: Parts
    below: Site
    y: Parts


def pairs_of(
    channels: Channels, wanted: Callable[[str], bool], number: Number, consumed: bool,
    parent_of: Callable[[Channels, Layer], str | None] | None = None,
) -> list[Pair]:  # fmt: skip
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
    out = []
    for name, layer in channels.layers.items():
        feeding = _couplings(channels, name, "in")
        if layer.kind not in ("conv", "linear") or layer.groups != 1 or not feeding or not wanted(name):
            continue
        rows = contiguous(layer.width_out, *number(layer, True), name)
        above, x = _above(channels, layer, rows, consumed)
        numbered = parent_of(channels, layer) if parent_of is not None else None
        group, coupling = feeding[0]
        whole = len(feeding) == 1 and len(coupling.index) == layer.width_in
        single = whole and _one_producer(channels, group)
        if numbered is not None and not (single and group.name == numbered):
            columns = y = contiguous(layer.width_in, *number(layer, False), name)
            below = _out(channels, numbered)
        elif whole:
            y = contiguous(group.width, *number(layer, False), name)
            columns = _positions(coupling, y)
            plain = single and not consumed
            below = _out(channels, group.name) if plain else _in(layer, group.name)
            y = y if plain else columns
        else:
            columns = y = contiguous(layer.width_in, *number(layer, False), name)
            below = _in(layer, group.name)
        out.append(Pair(name, rows, columns, above, x, below, y))
    return out


def contiguous(width: int, count: int, exactly: bool, layer: str) -> Parts:
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


def _couplings(channels: Channels, layer: str, side: str) -> list[tuple[ChannelGroup, Coupling]]:
    return [(g, c) for g in channels.groups for c in g.couplings if (c.layer, c.side) == (layer, side)]


def _one_producer(channels: Channels, group: ChannelGroup) -> bool:
    return len(group.producers) == 1 and not any(channels.layers[name].depthwise for name in group.layers)


def _positions(coupling: Coupling, parts: Parts) -> Parts:
    """Groups of a group's channels as groups of the positions they take in a layer."""
    return tuple(tuple(sorted(coupling.positions(part))) for part in parts)


def _above(channels: Channels, layer: Layer, rows: Parts, consumed: bool) -> tuple[Site, Parts]:
    """Where the child's own channels are read: raw, or at the first layer that consumes them and nothing else."""
    made = _couplings(channels, layer.name, "out")
    if consumed and len(made) == 1 and _one_producer(channels, made[0][0]):
        group, _ = made[0]
        for coupling in group.couplings:
            reader = channels.layers[coupling.layer]
            if coupling.side == "in" and reader.kind in ("conv", "linear") and len(coupling.index) == reader.width_in:
                return _in(reader, group.name), _positions(coupling, rows)
    return _out(channels, layer.name), rows


def _out(channels: Channels, name: str) -> Site:
    layer = channels.layers[name]
    return Site(name, name, layer.width_out, layer.kind, False)


def _in(layer: Layer, group: str) -> Site:
    return Site(f"{layer.name}:in", group, layer.width_in, layer.kind, False, "in")
