"""MACs and parameters by arithmetic on widths, under a named counting rule; dense and pruned by the same rule.

``macs``: multiply-accumulates of convolutions and linear layers.
``thop``: the operations of thop 0.1.1: convolutions without bias, linear layers, 4 per element of an affine batch
norm, average pools; layers of a type that thop does not know by its exact class count nothing.
``thop_old``: the operations of thop before 0.1: convolutions with 1 per output element for a bias, linear layers, 2 per
element of a batch norm, adaptive average pools (others nothing); of whatever class.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from dist_prune.pruning.channels import Channels, LatencyTable, Layer

Rule = Literal["macs", "thop", "thop_old"]
Quantity = Literal["macs", "params", "channels", "latency"]
BY_MACS = 0.1  # the part of a predicted time that follows multiplications


def _reach(layer: Layer, width_in: int) -> int:
    """Input channels that one filter sees; grouped convolutions lose whole groups."""
    return width_in if layer.groups == 1 else layer.width_in // layer.groups


def _macs(layer: Layer, width_in: int, width_out: int) -> int:
    if layer.kind == "conv":
        return width_out * _reach(layer, width_in) * layer.kernel * layer.positions
    if layer.kind == "linear":
        return width_in * width_out * layer.positions
    return 0


def macs(channels: Channels, kept: Mapping[str, int] | None = None, rule: Rule = "macs") -> int:
    """Operations of one image when each group keeps ``kept[group]`` channels (missing: all)."""
    widths, total = channels.widths(kept or {}), 0
    for name, layer in channels.layers.items():
        width_in, width_out = widths[name]
        if layer.kind in ("conv", "linear"):
            total += _macs(layer, width_in, width_out) * (int(layer.thop) if rule == "thop" else 1)
        if rule == "thop_old":
            total += int(_old(layer) * width_out)
        elif layer.kind in ("norm", "pool") and rule == "thop":
            total += int(layer.thop * width_out)
    return total


def weights(channels: Channels, kept: Mapping[str, int] | None = None) -> int:
    """Weights of convolutions and linear layers, without biases and norms."""
    return params(channels, kept, kernels_only=True)


def _old(layer: Layer) -> float:
    """What thop before 0.1 charges per output channel beside multiplications."""
    if layer.kind == "pool":  # thop 0.1.1 charges 1 per output element of a plain pool, at least 2 of an adaptive one
        return layer.thop if layer.thop > layer.positions else 0.0
    return float({"conv": layer.bias, "norm": 2, "linear": 0, "table": 0}[layer.kind] * layer.positions)


def params(channels: Channels, kept: Mapping[str, int] | None = None, kernels_only: bool = False) -> int:
    """Parameters (not buffers) of the network when each group keeps ``kept[group]`` channels."""
    widths, total = channels.widths(kept or {}), 0 if kernels_only else channels.other_params
    for name, layer in channels.layers.items():
        width_in, width_out = widths[name]
        total += 0 if kernels_only else layer.bias * width_out
        if layer.kind in ("conv", "linear"):
            total += width_out * _reach(layer, width_in) * layer.kernel
    return total


def amount(channels: Channels, quantity: Quantity, kept: Mapping[str, int] | None = None) -> float:
    """The quantity that a target names; ``channels`` counts the channels of the free groups, ``latency`` is a share of
    the dense network's (by the table of ``channels.latency``)."""
    if quantity == "channels":
        return sum((kept or {}).get(group.name, group.width) for group in channels.free)
    if quantity == "latency":
        return time_share(channels, kept or {})
    return macs(channels, kept) if quantity == "macs" else params(channels, kept)


def measured(channels: Channels, quantity: Quantity) -> bool:
    """Whether ``amount`` is known: times have to be measured before."""
    return quantity != "latency" or channels.latency is not None


def time_share(channels: Channels, kept: Mapping[str, int]) -> float:
    """The predicted share of the dense network's time when each group keeps ``kept[group]`` channels, corrected by the
    whole networks that were measured."""
    assert channels.latency is not None
    return channels.latency.bending(raw_time(channels, channels.latency, kept))


def raw_time(channels: Channels, table: LatencyTable, kept: Mapping[str, int]) -> float:
    """The share by the times of single groups alone, of which what each saves adds up.

    That is no prediction: groups of the same layer save a part of it twice, and the sum may fall below zero. But fewer
    channels never take more time by it (a small part follows multiplications, whatever was measured), so that a search
    between two networks gets on; whole networks that were measured make a prediction of it.
    """
    saved = 0.0
    for name, points in table.times.items():
        count = kept.get(name, points[-1][0])
        if count < points[-1][0]:
            widths, shares = zip(*points, strict=True)
            saved += 1 - float(np.interp(count, widths, shares))
    return 1 - (1 - BY_MACS) * saved - BY_MACS * (1 - macs(channels, kept) / macs(channels))
