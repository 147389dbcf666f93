"""A plan: the channels and weight blocks that are removed, by name. Frozen, with a JSON form and a fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dist_prune.errors import PruneError, shown
from dist_prune.pruning.graph.blocks import block_key
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.weight_blocks import WeightBlocks, remaining_positions

FORMAT = 1
WIDEST = 2**20  # limit of channels of a group and of blocks of a layer, in files


@dataclass(frozen=True)
class Plan:
    """Removed channels per group and cut blocks per layer, in coordinates of the dense network.

    Every channel number refers to the dense network, also after several rounds. ``surgery.apply_plan`` cuts the plan
    out of a network. Example for a network of two groups that keeps all of ``conv2``::

        Plan({"conv1": (0, 3)}, {"conv1": 8, "conv2": 16}).kept("conv1")  # [1, 2, 4, 5, 6, 7]

    Attributes:
        removed: group -> removed channels, ascending, each once, in [0, width); at least one channel of each group is
            kept. Groups that lose nothing are absent.
        widths: group -> dense width, for every group of the network, protected ones included.
        reasons: group -> why nothing was removed there. For reports; not part of the fingerprint.
        blocks: layer -> blocks of its weight that are zero and stay zero in training; layers without blocks are absent.
        blocks_removed: module paths of residual blocks that are gone as a whole, ascending, each once. Their shortcuts
            pass on what they read.
        graph: of the dense network, if ``dist_prune.select`` made the plan in this process; never written.

    Raises:
        PruneError: a group is unknown, its channels are not ascending or out of range, or none would be kept;
            ``blocks_removed`` are no paths, not ascending, or one lies inside another.

    Example:
        >>> dp.Plan({"conv1": (0, 3)}, {"conv1": 8, "conv2": 16}).kept("conv1")
        [1, 2, 4, 5, 6, 7]
        >>> dp.Plan.from_json(plan.to_json()).fingerprint == plan.fingerprint
        True
    """

    removed: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    reasons: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, WeightBlocks] = field(default_factory=dict)
    blocks_removed: tuple[str, ...] = ()
    graph: DependencyGraph | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        for group, gone in self.removed.items():
            if group not in self.widths:
                raise PruneError(f"the plan removes channels of {group!r}, which is no group of this network")
            if list(gone) != sorted(set(gone)) or not gone or gone[0] < 0 or gone[-1] >= self.widths[group]:
                raise PruneError(
                    f"the plan's channels of {group!r} are not ascending indices below {self.widths[group]}"
                )
            if len(gone) >= self.widths[group]:
                raise PruneError(f"the plan removes every channel of {group!r}; at least one has to survive")
        for layer, blocks in self.blocks.items():
            if blocks.empty:
                raise PruneError(f"the plan's blocks of {layer!r} cut nothing; such a layer is left out")
        _check_paths(self.blocks_removed)

    @classmethod
    def from_kept(
        cls, graph: DependencyGraph, kept: Mapping[str, list[int]], reasons: Mapping[str, str] | None = None
    ) -> "Plan":
        """Make the plan that keeps the channels ``kept[group]`` of free groups, and everything else.

        Args:
            graph: the network's dependency graph; its free groups are the only ones that lose channels.
            kept: free group -> kept channels, in any order; groups that are absent keep all. A block with an empty list
                goes as a whole.
            reasons: group -> why nothing is removed there; a standard sentence otherwise.
        """
        removed = {}
        why = {group.name: group.protected for group in graph.groups if group.protected}
        gone_blocks = [block for block in graph.blocks if not kept.get(block.key, [0])]
        inside = {name: block.path for block in gone_blocks for name in block.groups}
        for group in graph.free:
            if group.name in inside:
                why[group.name] = f"its block {inside[group.name]} is removed"
                continue
            kept_channels = set(kept.get(group.name, range(group.width)))
            gone = tuple(i for i in range(group.width) if i not in kept_channels)
            if gone:
                removed[group.name] = gone
            else:
                why[group.name] = (reasons or {}).get(group.name, "every channel was worth keeping")
        paths = tuple(sorted(block.path for block in gone_blocks))
        return cls(removed, {group.name: group.width for group in graph.groups}, why, blocks_removed=paths)

    @property
    def empty(self) -> bool:
        """Whether no channel is removed, no block of weights is cut and no residual block is gone."""
        return not self.removed and not self.blocks and not self.blocks_removed

    def kept(self, group: str) -> list[int]:
        """Return the kept channels of a group, ascending, in coordinates of the dense network."""
        gone = set(self.removed.get(group, ()))
        return [i for i in range(self.widths[group]) if i not in gone]

    @property
    def counts(self) -> dict[str, int]:
        """Group -> number of kept channels, for every group; and ``block:PATH`` -> 0 for residual blocks that go."""
        return self.groups_kept | {block_key(path): 0 for path in self.blocks_removed}

    @property
    def groups_kept(self) -> dict[str, int]:
        """Group -> number of kept channels, for every group."""
        return {group: width - len(self.removed.get(group, ())) for group, width in self.widths.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def canonical(self) -> str:
        """Return the canonical JSON: sorted keys, no spaces, no reasons, no blocks if none is cut."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "removed": {group: list(channels) for group, channels in self.removed.items()},
            "widths": dict(self.widths),
        }
        if self.blocks:
            body["blocks"] = {layer: blocks.to_dict() for layer, blocks in self.blocks.items()}
        if self.blocks_removed:
            body["blocks_removed"] = list(self.blocks_removed)
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    def to_json(self) -> str:
        """Return indented JSON with the reasons and the fingerprint, for a file."""
        body = json.loads(self.canonical()) | {"reasons": dict(self.reasons), "fingerprint": self.fingerprint}
        return json.dumps(body, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read the text of ``to_json``.

        Raises:
            PruneError: the text is no plan, has another format version, or was altered.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PruneError(f"this is not a plan: {error!r}") from error
        return cls.from_dict(body)

    @classmethod
    def from_dict(cls, body: Any) -> "Plan":
        """Make a plan of the decoded values of ``to_json``; their types and sizes are checked.

        Raises:
            PruneError: the values are no plan, have another format version, or were altered.
        """
        try:
            widths = {_check_text(group): _check_index(width, 1) for group, width in body["widths"].items()}
            removed = {_check_text(group): tuple(map(_check_index, gone)) for group, gone in body["removed"].items()}
            reasons = {_check_text(group): _check_text(why) for group, why in body.get("reasons", {}).items()}
            blocks = {_check_text(layer): _parse_blocks(values) for layer, values in body.get("blocks", {}).items()}
            paths = body.get("blocks_removed", [])
            blocks_removed = tuple(paths) if isinstance(paths, list) else paths
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, PruneError):
                raise
            raise PruneError(f"this is not a plan: {shown(error)}") from error
        plan = cls(removed, widths, reasons, blocks, blocks_removed)
        if body.get("format") != FORMAT:
            raise PruneError(
                f"plan format {shown(body.get('format'))} is not known; this version reads format {FORMAT}"
            )
        if body.get("fingerprint", plan.fingerprint) != plan.fingerprint:
            raise PruneError("the plan's fingerprint does not match its content: the file was altered or cut short")
        return plan

    def then(self, later: "Plan", graph: DependencyGraph | None = None) -> "Plan":
        """Compose this plan with a later one into a single plan in coordinates of the dense network.

        Args:
            later: a plan made on the network that this plan leaves, in coordinates of that network.
            graph: dependency graph of the dense network; needed if ``later`` cuts blocks.

        Raises:
            PruneError: ``later`` was made on another network, or ``graph`` is missing.
        """
        if self.groups_kept != dict(later.widths):
            raise PruneError("the later plan was not made on the network that this plan leaves: group widths differ")
        removed = dict(self.removed)
        for group, gone in later.removed.items():
            kept = self.kept(group)
            removed[group] = tuple(sorted({*removed.get(group, ()), *(kept[i] for i in gone)}))
        blocks = dict(self.blocks)
        if later.blocks:
            if graph is None:
                raise PruneError(
                    "the later plan cuts blocks: composing needs the dependency graph of the dense network"
                )
            positions = remaining_positions(graph, self.removed)
            for layer, cut in later.blocks.items():
                moved = cut.to_dense(positions[layer, "out"], positions[layer, "in"])
                blocks[layer] = blocks[layer].union(moved) if layer in blocks else moved
        reasons = {g: r for g, r in later.reasons.items() if g not in removed}
        gone = tuple(sorted({*self.blocks_removed, *later.blocks_removed}))
        return Plan(removed, self.widths, reasons, blocks, gone)


def _check_index(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= WIDEST:
        raise PruneError(f"this is not a plan: {shown(value)} is no width or channel up to {WIDEST:,}")
    return value


def _check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise PruneError(f"this is not a plan: {shown(value)} is no text")
    return value


def _check_paths(paths: Any) -> None:
    """PruneError if these are no module paths of blocks that lie apart from one another."""
    if not isinstance(paths, tuple) or not all(isinstance(path, str) and path for path in paths):
        raise PruneError(f"the plan's blocks_removed are no module paths such as 'layer1.0': {shown(paths)}")
    if list(paths) != sorted(set(paths)):
        raise PruneError("the plan's blocks_removed are not ascending, each once")
    for inner in paths:
        if outer := next((path for path in paths if inner.startswith(f"{path}.")), ""):
            raise PruneError(f"the plan's blocks_removed name {outer!r} and {inner!r}, which lies inside it")


def _parse_blocks(values: Any) -> WeightBlocks:
    rows, columns, cut = (
        [[_check_index(i) for i in part] for part in values[key]] for key in ("rows", "columns", "cut")
    )
    return WeightBlocks.of(rows, columns, cut)
