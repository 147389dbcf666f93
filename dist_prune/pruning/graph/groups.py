"""What can be cut of a network: its layers, its channel groups and the sites where they are observed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

import numpy as np

Side = Literal["out", "in"]
HookKind = Literal["out", "in", "weight"]
Kind = Literal["conv", "linear", "norm", "pool", "table"]  # table: one column per attention head
Unit = Literal["channel", "head", "conv group"]


@dataclass(frozen=True)
class Layer:
    """One layer as arithmetic sees it; widths are channels (features for linear layers)."""

    name: str
    kind: Kind
    width_in: int
    width_out: int
    groups: int = 1
    kernel: int = 1  # positions of one filter, kh * kw
    positions: int = 1  # output positions per image, H * W (tokens for a linear layer)
    bias: int = 0  # parameters per output channel beside the kernel's (bias; weight and bias of a norm)
    thop: float = 0.0  # what thop 0.1.1 charges: per MAC (conv, linear) or per output channel and image (norm, pool)

    @property
    def depthwise(self) -> bool:
        return self.kind == "conv" and self.groups == self.width_in == self.width_out > 1


@dataclass(frozen=True)
class Coupling:
    """Where the channels of a group lie in one layer: position ``index[i]`` belongs to channel ``channel[i]``."""

    layer: str
    side: Side
    index: tuple[int, ...]
    channel: tuple[int, ...]

    def positions(self, channels: Iterable[int]) -> list[int]:
        """The positions that go when ``channels`` of the group go."""
        gone = set(channels)
        return [i for i, c in zip(self.index, self.channel, strict=True) if c in gone]


@dataclass(frozen=True)
class ChannelGroup:
    """Slices that must go together (residual additions, concatenations, depthwise), named by their leader.

    The leader is the producer with the fewest convolutions before it: the stem of a first residual stream, the
    projection shortcut of a later one, the expansion in front of a depthwise layer.
    """

    name: str
    width: int
    producers: tuple[str, ...]  # conv and linear layers whose outputs are the group's channels; the leader is first
    couplings: tuple[Coupling, ...]
    protected: str = ""  # why nothing may be cut; empty: free
    excluded: bool = False  # the recipe wants the layers that make its channels left alone
    unit: Unit = "channel"  # what one of its channels is: whole heads and conv groups take several positions
    gone: int = 0  # channels that earlier rounds cut: ``width`` is what they left of the dense network's

    @property
    def dense(self) -> int:
        """The width in the dense network, which floors, caps and shares refer to."""
        return self.width + self.gone

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer that changes when a channel goes, each once."""
        return tuple(dict.fromkeys(coupling.layer for coupling in self.couplings))

    def unit_order(self, layer: str) -> tuple[int, ...]:
        """A producer's outputs in the order of the units, each unit's together; empty where units are channels."""
        if self.unit == "channel":
            return ()
        parts = [c for c in self.couplings if (c.layer, c.side) == (layer, "out")]
        pairs = sorted((unit, place) for c in parts for place, unit in zip(c.index, c.channel, strict=True))
        return tuple(place for _, place in pairs)

    @cached_property
    def per_channel(self) -> dict[tuple[str, Side], int]:
        """(layer, side) -> positions that one channel takes."""
        return {(c.layer, c.side): len(c.index) // self.width for c in self.couplings}


@dataclass(frozen=True)
class HookPoint:
    """One layer's output, named by module path; or what enters it (side "in") or its weight (side "weight"), named
    ``<module path>:in`` and ``<module path>:weight``."""

    name: str
    group: str
    width: int
    kind: Kind
    leader: bool
    side: HookKind = "out"
    unit_order: tuple[int, ...] = ()  # of whole units: the layer's outputs, unit after unit

    @property
    def layer(self) -> str:
        """The module path."""
        return self.name if self.side == "out" else self.name.removesuffix(f":{self.side}")

    @property
    def at_weight(self) -> "HookPoint":
        """The weight of the layer."""
        return replace(self, name=f"{self.layer}:weight", side="weight")


@dataclass(frozen=True)
class LatencyTable:
    """Measured time of the dense network with one group alone cut to some widths, as shares of the dense time.

    Attributes:
        times: group -> ((kept channels, share of the dense time), ...), widths ascending, the dense one last.
        bend: (share by ``times``, measured share) of whole networks, ascending in both; empty: not corrected.
    """

    times: Mapping[str, tuple[tuple[int, float], ...]]
    bend: tuple[tuple[float, float], ...] = ()

    def bending(self, share: float) -> float:
        """The share that measured whole networks make of one that the table says."""
        if not self.bend:
            return share
        raw, measured = zip(*self.bend, strict=True)
        return float(np.interp(share, raw, measured))


@dataclass(frozen=True)
class TracedNetwork:
    """The dense network that a graph was traced on, as a bundle describes it.

    Attributes:
        maker: ``package.module:Name`` of its class.
        architecture: timm's name of it, or empty.
        signature: name -> shape of every parameter and buffer that is saved.
    """

    maker: str
    architecture: str
    signature: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class DependencyGraph:
    """All of a network's layers and groups, as traced on one example input."""

    layers: Mapping[str, Layer]
    groups: tuple[ChannelGroup, ...]
    other_params: int  # parameters that no group can change and no layer above counts
    example: tuple[int, ...]  # (C, H, W) of the input
    latency: LatencyTable | None = None  # measured times, where a target asks for them
    origin: "DependencyGraph | None" = None  # of the dense network, where earlier rounds have cut this one (narrow.py)
    network: TracedNetwork | None = field(default=None, compare=False, repr=False)  # known to the library alone

    def __str__(self) -> str:
        """The groups as a table: name, channels, layers that change with them, and why a group is protected."""
        lines = [f"{len(self.groups)} channel groups, {len(self.free)} of them free to be pruned"]
        name_width = max((len(group.name) for group in self.groups), default=0)
        for group in self.groups:
            layers = ", ".join(name for name in group.layers if name != group.name)
            why = f"  protected: {group.protected}" if group.protected else ""
            lines.append(f"{group.name:<{name_width}}  {group.width:>5}  {layers}{why}")
        return "\n".join(lines)

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be cut."""
        return tuple(group for group in self.groups if not group.protected)

    @property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """The producers of every free group, leaders first within their group."""
        return tuple(
            HookPoint(
                name,
                group.name,
                group.width,
                self.layers[name].kind,
                name == group.name,
                unit_order=group.unit_order(name),
            )
            for group in self.free
            for name in group.producers
        )

    def whole_channels_only(self) -> "DependencyGraph":
        """The same, with every group protected whose channels are whole units."""

        def guard(group: ChannelGroup) -> ChannelGroup:
            why = f"it goes by whole {group.unit}s, and this method judges single channels"
            return group if group.unit == "channel" or group.protected else replace(group, protected=why)

        return replace(self, groups=tuple(guard(group) for group in self.groups))

    def group(self, name: str) -> ChannelGroup:
        return next(group for group in self.groups if group.name == name)

    def unmatched(self, globs: Iterable[str]) -> list[str]:
        """The globs that match no producer of any group."""
        names = [name for group in self.groups for name in group.producers]
        return [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]

    def exclude(self, globs: Iterable[str]) -> "DependencyGraph":
        """The same, with every group protected that has a layer matching one of ``globs``."""
        patterns = tuple(globs)

        def guard(group: ChannelGroup) -> ChannelGroup:
            hit = next((p for p in patterns if any(fnmatchcase(n, p) for n in group.producers)), None)
            if hit is None:
                return group
            return replace(group, excluded=True, protected=group.protected or f"excluded by select.exclude {hit!r}")

        return replace(self, groups=tuple(guard(group) for group in self.groups))

    def restrict_to(self, globs: Iterable[str]) -> "DependencyGraph":
        """The same, with every group protected that has no layer matching one of ``globs`` (none: no change)."""
        patterns = tuple(globs)

        def guard(group: ChannelGroup) -> ChannelGroup:
            named = not patterns or any(fnmatchcase(n, p) for n in group.producers for p in patterns)
            return group if named or group.protected else replace(group, protected="not named by select.include")

        return replace(self, groups=tuple(guard(group) for group in self.groups))

    def widths(self, kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Layer -> (width in, width out) when group ``g`` keeps ``kept[g]`` channels (missing: all)."""
        cut_in: dict[str, int] = {}
        cut_out: dict[str, int] = {}
        for group in self.groups:
            gone = group.width - kept.get(group.name, group.width)
            if gone:
                for (layer, side), each in group.per_channel.items():
                    side_cut = cut_out if side == "out" else cut_in
                    side_cut[layer] = side_cut.get(layer, 0) + gone * each
        out = {}
        for name, layer in self.layers.items():
            width_out = layer.width_out - cut_out.get(name, 0)
            both = layer.kind in ("norm", "pool", "table") or layer.depthwise
            out[name] = (width_out if both else layer.width_in - cut_in.get(name, 0), width_out)
        return out
