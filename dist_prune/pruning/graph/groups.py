"""The dependency graph of a network as data: layers, channel groups, and the hook points of their channels.

Widths and indices refer to the network that was traced. ``plan.after_pruning`` derives the graph of a pruned one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from dist_prune.errors import PruneError, nearest
from dist_prune.pruning.graph.blocks import Block, block_key
from dist_prune.pruning.graph.known_costs import LatencyTable, MemoryCount
from dist_prune.pruning.graph.window import Window

Side = Literal["out", "in"]
HookKind = Literal["out", "in", "weight"]
# table: one column per attention head; layer norm: any norm over channels; parameter: one that no layer holds
Kind = Literal["conv", "linear", "norm", "pool", "table", "layer norm", "parameter"]
RUNS_THROUGH = "it runs through "  # reason of a group with a member that is no layer of the graph
Unit = Literal["channel", "head", "conv group", "pair", "head position"]
SINGLE: tuple[Unit, ...] = ("channel", "pair", "head position")  # units whose numbers are rounded, and have a floor
# what traces find besides channels: as in earlier versions, or all units of unit_forms.FORMS
Units = Literal["earlier", "whole", "head_width"]


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer that costs are computed from.

    Attributes:
        name: module path in the network, as of ``named_modules``.
        kind: ``conv``, ``linear``, ``norm`` (batch norm), ``pool`` (average pool), ``table`` (a parameter of an
            attention module with one column per head), ``layer norm`` (a norm over channels) or ``parameter`` (one
            that no layer holds, as a position embedding). The last two are in graphs that were traced with streams.
        width_in: input channels (features of a linear layer); equal to ``width_out`` for norms, pools, tables and
            parameters.
        width_out: output channels.
        groups: groups of a grouped convolution, or of a group norm.
        kernel: entries of one filter per input channel, kh * kw.
        positions: output positions per image, H * W (tokens for a linear layer; of a transposed convolution those of
            its input); summed over all calls of the layer.
        bias: parameters per output channel besides the kernel: 1 for a bias, 2 for an affine norm or for a bias and the
            gain of a standardised convolution.
        transposed: whether this is a transposed convolution, whose weight is (in, out / groups, kh, kw).
        places: output positions per image if they are not ``positions``, which of a transposed convolution are those
            of its input; else 0.
        thop: operations that thop 0.1.1 counts: per MAC (conv, linear), or per output channel and image (norm, pool).
        axis: of the channels of a bare parameter.
        window: which input positions an output position of a convolution reads; None of other kinds.
    """

    name: str
    kind: Kind
    width_in: int
    width_out: int
    groups: int = 1
    kernel: int = 1
    positions: int = 1
    bias: int = 0
    thop: float = 0.0
    transposed: bool = False
    places: int = 0
    axis: int = 0
    window: Window | None = None

    @property
    def depthwise(self) -> bool:
        """Whether this is a depthwise convolution: one filter per channel, and as many channels out as in."""
        return self.kind == "conv" and self.groups == self.width_in == self.width_out > 1

    def filter_inputs(self, width_in: int) -> int:
        """The input channels of one filter at a width; grouped convolutions lose whole groups."""
        return width_in if self.groups == 1 else self.width_in // self.groups

    def params(self, width_in: int, width_out: int, kernels_only: bool = False) -> int:
        """The number of its parameters at some widths; ``kernels_only``: of weights of convolutions and products."""
        kernels = width_out * self.filter_inputs(width_in) * self.kernel if self.kind in ("conv", "linear") else 0
        return kernels + (0 if kernels_only else self.bias * width_out)


@dataclass(frozen=True)
class Coupling:
    """The positions that a group's channels take on one side of one layer.

    Position ``index[i]`` belongs to channel ``channel[i]``. A channel takes several positions if maps were flattened
    before a linear layer, or if the channel is a whole head or conv group. For a group of 2 channels whose 2 x 2 maps
    enter a linear layer: ``Coupling("fc", "in", (0, 1, 2, 3, 4, 5, 6, 7), (0, 0, 0, 0, 1, 1, 1, 1))``.

    Attributes:
        layer: module path.
        side: ``out`` for outputs (also of norms, pools and depthwise convolutions), ``in`` for inputs.
        index: positions in the layer, from 0; other groups may hold positions of the same side (concatenations).
        channel: channels of the group, in [0, width), as many as ``index``.
    """

    layer: str
    side: Side
    index: tuple[int, ...]
    channel: tuple[int, ...]

    def positions(self, channels: Iterable[int]) -> list[int]:
        """Return the layer's positions that belong to ``channels`` of the group, in the order of ``index``."""
        chosen = set(channels)
        return [i for i, c in zip(self.index, self.channel, strict=True) if c in chosen]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are tied to one another across layers: channel ``c`` is removed from all of its layers or none.

    Residual additions, concatenations, norms and depthwise convolutions tie layers together. The group has the name of
    its leader: the producer with the fewest convolutions before it. That is the stem of a first residual stream, the
    projection shortcut of a later one, and the expansion before a depthwise layer.

    Attributes:
        name: module path of the leader.
        width: channels of the group in the traced network, C; channels are numbered from 0 to C - 1.
        producers: conv and linear layers whose outputs are the group's channels; the leader is first.
        couplings: the positions of the channels in every layer that changes with them.
        protected: reason why no channel may be removed; empty for a free group. Groups are protected whose channels are
            the network's outputs, that cannot be followed through the network, or that the recipe excludes.
        excluded: whether ``select.exclude`` names one of its producers.
        unit: ``channel``, or ``head``, ``conv group``, ``pair`` (an output and its gate) or ``head position`` (of all
            heads of a layer) if each of its channels is such a unit of several positions.
        gone: channels that earlier rounds removed; the dense width is ``width + gone``.

    Example:
        >>> group = graph.group("layer1.0.conv1")
        >>> group.width, group.layers
        (64, ('layer1.0.conv1', 'layer1.0.bn1', 'layer1.0.conv2'))
    """

    name: str
    width: int
    producers: tuple[str, ...]
    couplings: tuple[Coupling, ...]
    protected: str = ""
    excluded: bool = False
    unit: Unit = "channel"
    gone: int = 0

    @property
    def dense(self) -> int:
        """Width in the dense network; floors, caps and shares refer to it."""
        return self.width + self.gone

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer that changes if a channel is removed, each once."""
        return tuple(dict.fromkeys(coupling.layer for coupling in self.couplings))

    def unit_order(self, layer: str) -> tuple[int, ...]:
        """Return a producer's output positions sorted by unit; empty if the units are channels.

        Args:
            layer: module path of a producer.
        """
        if self.unit == "channel":
            return ()
        outputs = [c for c in self.couplings if (c.layer, c.side) == (layer, "out")]
        pairs = sorted((unit, position) for c in outputs for position, unit in zip(c.index, c.channel, strict=True))
        return tuple(position for _, position in pairs)

    @cached_property
    def per_channel(self) -> dict[tuple[str, Side], int]:
        """(layer, side) -> number of positions that one channel takes there."""
        return {(c.layer, c.side): len(c.index) // self.width for c in self.couplings}


@dataclass(frozen=True)
class HookPoint:
    """One tensor of one layer that statistics are collected of: its output, its first input or its weight.

    Attributes:
        name: the module path for an output, ``<module path>:in`` for an input, ``<module path>:weight`` for a weight.
        group: name of the channel group.
        width: channels of the tensor; heads or conv groups count as one channel if ``unit_order`` is set. An input
            after a concatenation has channels of several groups.
        kind: kind of the layer; linear layers have their features last.
        leader: whether the layer leads its group.
        side: ``out``, ``in`` or ``weight``.
        unit_order: the layer's outputs sorted by unit if the group's channels are heads or conv groups; else empty.

    Example:
        >>> point = graph.hook_points[0]
        >>> point.name, point.width, point.kind
        ('conv1', 64, 'conv')
    """

    name: str
    group: str
    width: int
    kind: Kind
    leader: bool
    side: HookKind = "out"
    unit_order: tuple[int, ...] = ()

    @property
    def layer(self) -> str:
        """Module path of the layer."""
        return self.name if self.side == "out" else self.name.removesuffix(f":{self.side}")

    @property
    def at_weight(self) -> "HookPoint":
        """The hook point at the layer's weight."""
        return replace(self, name=f"{self.layer}:weight", side="weight")


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
    """All layers and channel groups of a network, as traced on one example image. Immutable, holds no tensors.

    Attributes:
        layers: module path -> layer, in module order.
        groups: free and protected groups, in module order of their leaders.
        other_params: number of parameters that no layer in ``layers`` counts and no plan changes.
        example: (C, H, W) of the example image.
        latency: measured times, if the recipe has a latency target.
        origin: graph of the dense network, if this network was pruned in earlier rounds.
        memory: counts the peak of activations of the network that was traced, at any widths.
        blocks: residual blocks that can go as a whole, in module order, if the network was traced with depth.

    Example:
        >>> print(graph)
        13 channel groups, 12 of them free to be pruned
        ...
        >>> [group.name for group in graph.groups if group.protected]
        ['fc']
    """

    layers: Mapping[str, Layer]
    groups: tuple[ChannelGroup, ...]
    other_params: int
    example: tuple[int, ...]
    latency: LatencyTable | None = None
    origin: "DependencyGraph | None" = None
    network: TracedNetwork | None = field(default=None, compare=False, repr=False)
    memory: MemoryCount | None = field(default=None, compare=False, repr=False)
    blocks: tuple[Block, ...] = ()

    def __str__(self) -> str:
        """The groups as a table: name, channels, layers that change with them, and why a group is protected."""
        lines = [f"{len(self.groups)} channel groups, {len(self.free)} of them free to be pruned"]
        name_width = max((len(group.name) for group in self.groups), default=0)
        for group in self.groups:
            layers = ", ".join(name for name in group.layers if name != group.name)
            why = f"  protected: {group.protected}" if group.protected else ""
            lines.append(f"{group.name:<{name_width}}  {group.width:>5}  {layers}{why}")
        if self.blocks:
            names = ", ".join(block.path for block in self.free_blocks)
            lines.append(f"{len(self.free_blocks)} blocks that can go as a whole: {names}")
        return "\n".join(lines)

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The groups whose channels may be removed: those without a reason in ``protected``."""
        return tuple(group for group in self.groups if not group.protected)

    @property
    def free_blocks(self) -> tuple[Block, ...]:
        """The residual blocks that may go as a whole."""
        return tuple(block for block in self.blocks if not block.protected)

    @property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """The outputs of the producers of every free group, leaders first within their group."""
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

    @property
    def present(self) -> dict[str, int]:
        """Numbers of channels that are left of the dense network: of every group, and 0 of blocks that are gone."""
        here = {block.path for block in self.blocks}
        gone = {block.key: 0 for block in (self.origin or self).blocks if block.path not in here}
        return {group.name: group.width for group in self.groups} | gone

    def without(self, blocks: Iterable[str]) -> dict[str, int]:
        """Numbers of channels if some blocks go: 0 of each, and all of the groups inside, which have none to lose.

        Args:
            blocks: module paths.
        """
        paths = tuple(blocks)
        inside = self.inside(paths)
        return {block_key(path): 0 for path in paths} | {g.name: g.width for g in self.groups if g.name in inside}

    def inside(self, blocks: Iterable[str]) -> set[str]:
        """Names of the groups whose layers are all inside one of some blocks, given by their module paths."""
        paths = set(blocks)
        return {name for block in self.blocks if block.path in paths for name in block.groups}

    def whole_channels_only(self) -> "DependencyGraph":
        """Return a copy with every group protected whose channels are heads or conv groups."""

        def protect(group: ChannelGroup) -> ChannelGroup:
            why = f"its channels are whole {group.unit}s, and this method scores single channels"
            return group if group.unit == "channel" or group.protected else replace(group, protected=why)

        return replace(self, groups=tuple(protect(group) for group in self.groups))

    def group(self, name: str) -> ChannelGroup:
        """Return the group of that name."""
        return next(group for group in self.groups if group.name == name)

    @property
    def producers(self) -> tuple[str, ...]:
        """The producers of all groups, each once."""
        return tuple(dict.fromkeys(name for group in self.groups for name in group.producers))

    def check_removable(self, names: Iterable[str], blocks: Iterable[str] = ()) -> None:
        """Raise PruneError if a graph that was traced otherwise knows what a plan removes, and this one does not.

        Args:
            names: groups that lose channels; they may run through norms or parameters.
            blocks: module paths of blocks that go as a whole.
        """
        known = {block.path for block in self.blocks}
        for path in blocks:
            if path not in known:
                raise PruneError(
                    f"the plan removes the block {path!r}, which this graph does not know as a residual block. Write "
                    "select.depth=true, in the library trace(..., depth=True)"
                )
        for name in names:
            why = self.group(name).protected
            if why.startswith(RUNS_THROUGH):
                raise PruneError(
                    f"the plan removes channels of {name!r}; without streams {why}. Write backbone.streams=true, in "
                    "the library trace(..., streams=True)"
                )

    def protect_producers(self, reasons: Mapping[str, str]) -> "DependencyGraph":
        """Return a copy with every group protected that has a producer among the keys of ``reasons``.

        A reason given here stands for that of the tracer, which says what it could not follow.
        """
        if not reasons:
            return self

        def protect(group: ChannelGroup) -> ChannelGroup:
            why = next((reasons[name] for name in group.producers if name in reasons), "")
            return replace(group, protected=why or group.protected)

        return replace(self, groups=tuple(protect(group) for group in self.groups))

    def unmatched(self, globs: Iterable[str]) -> list[str]:
        """Return the globs that match no producer of any group, and no block."""
        names = [name for group in self.groups for name in group.producers] + [block.path for block in self.blocks]
        return [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]

    def exclude(self, globs: Iterable[str]) -> "DependencyGraph":
        """Return a copy with every group protected that has a producer matching one of ``globs``, and every block."""
        patterns = tuple(globs)

        def leave(block: Block) -> Block:
            match = block.match(patterns)
            why = block.protected or (f"excluded by select.exclude {match!r}" if match else "")
            return replace(block, protected=why)

        def protect(group: ChannelGroup) -> ChannelGroup:
            match = next((p for p in patterns if any(fnmatchcase(n, p) for n in group.producers)), None)
            if match is None:
                return group
            return replace(group, excluded=True, protected=group.protected or f"excluded by select.exclude {match!r}")

        groups, blocks = tuple(map(protect, self.groups)), tuple(map(leave, self.blocks))
        return replace(self, groups=groups, blocks=blocks)

    def protect(self, globs: Iterable[str]) -> "DependencyGraph":
        """Return a copy with every group protected that changes the outputs of a layer matching one of ``globs``.

        Args:
            globs: of module paths, convolutions, linear layers, norms and pools alike (``backbone.protect``).

        Raises:
            PruneError: a glob matches no layer.
        """
        patterns = tuple(globs)
        for glob in patterns:
            if not any(fnmatchcase(name, glob) for name in self.layers):
                raise PruneError(
                    f"backbone.protect: no layer is called {glob!r}.{nearest(glob, self.layers)} "
                    "'dist-prune check' and print(graph) list the layers"
                )

        def protect(group: ChannelGroup) -> ChannelGroup:
            outputs = {coupling.layer for coupling in group.couplings if coupling.side == "out"}
            match = next((p for p in patterns if any(fnmatchcase(name, p) for name in outputs)), None)
            if match is None or group.protected:
                return group
            return replace(group, protected=f"named by backbone.protect {match!r}")

        return replace(self, groups=tuple(protect(group) for group in self.groups)) if patterns else self

    def restrict_to(self, globs: Iterable[str]) -> "DependencyGraph":
        """Return a copy with every group protected that no glob matches at a producer (no globs: no change).

        Of the blocks those stay free that a glob matches, by its path or by a layer inside.
        """
        patterns = tuple(globs)

        def leave(block: Block) -> Block:
            named = not patterns or block.match(patterns)
            return block if named or block.protected else replace(block, protected="not named by select.include")

        def protect(group: ChannelGroup) -> ChannelGroup:
            named = not patterns or any(fnmatchcase(n, p) for n in group.producers for p in patterns)
            return group if named or group.protected else replace(group, protected="not named by select.include")

        groups, blocks = tuple(map(protect, self.groups)), tuple(map(leave, self.blocks))
        return replace(self, groups=groups, blocks=blocks)

    def widths(self, kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Compute the widths of every layer after pruning.

        Args:
            kept: group -> number of kept channels; groups that are absent keep all. A ``Block.key`` with 0 is gone.

        Returns:
            Layer -> (input channels, output channels); (0, 0) inside blocks that are gone.
        """
        cut_in: dict[str, int] = {}
        cut_out: dict[str, int] = {}
        for group in self.groups:
            gone = group.width - kept.get(group.name, group.width)
            if gone:
                for (layer, side), each in group.per_channel.items():
                    side_cut = cut_out if side == "out" else cut_in
                    side_cut[layer] = side_cut.get(layer, 0) + gone * each
        out, gone_layers = {}, self.layers_gone(kept)
        for name, layer in self.layers.items():
            if name in gone_layers:
                out[name] = (0, 0)
                continue
            width_out = layer.width_out - cut_out.get(name, 0)
            both = layer.kind not in ("conv", "linear") or layer.depthwise
            out[name] = (width_out if both else layer.width_in - cut_in.get(name, 0), width_out)
        return out

    def layers_gone(self, kept: Mapping[str, int]) -> set[str]:
        """The layers inside blocks that are gone; ``kept`` as in ``widths``."""
        return {layer for block in self.blocks if kept.get(block.key) == 0 for layer in block.layers}
