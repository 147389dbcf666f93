"""A plan: which channels and blocks of weights go, by name. Frozen, JSON, with a fingerprint; surgery replays it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dist_prune.errors import PruneError, shown
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.weight_blocks import WeightBlocks, remaining_positions

FORMAT = 1
WIDEST = 2**20  # channels of a group, blocks of a layer


@dataclass(frozen=True)
class Plan:
    """Removed channels per group and cut blocks per layer, in the coordinates of the dense network.

    Attributes:
        removed: group -> removed channels, ascending; groups that lose nothing are absent.
        widths: group -> dense width, for every group of the network.
        reasons: group -> why nothing was cut there. For reports; not part of the fingerprint.
        blocks: layer -> blocks of its weight that are zero and stay so in training; layers without are absent.
        graph: of the dense network, if the plan was made in this process by ``dist_prune.select``; never written.
    """

    removed: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    reasons: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, WeightBlocks] = field(default_factory=dict)
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

    @classmethod
    def keeping(
        cls, graph: DependencyGraph, kept: Mapping[str, list[int]], reasons: Mapping[str, str] | None = None
    ) -> "Plan":
        """The plan that keeps ``kept[group]`` of each free group named there, and everything else."""
        removed = {}
        why = {group.name: group.protected for group in graph.groups if group.protected}
        for group in graph.free:
            stays = set(kept.get(group.name, range(group.width)))
            gone = tuple(i for i in range(group.width) if i not in stays)
            if gone:
                removed[group.name] = gone
            else:
                why[group.name] = (reasons or {}).get(group.name, "every channel was worth keeping")
        return cls(removed, {group.name: group.width for group in graph.groups}, why)

    @property
    def empty(self) -> bool:
        """True where nothing is removed and no block is cut."""
        return not self.removed and not self.blocks

    def kept(self, group: str) -> list[int]:
        """The surviving channels of a group, ascending, in dense coordinates."""
        gone = set(self.removed.get(group, ()))
        return [i for i in range(self.widths[group]) if i not in gone]

    @property
    def counts(self) -> dict[str, int]:
        """Group -> number of surviving channels."""
        return {group: width - len(self.removed.get(group, ())) for group, width in self.widths.items()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def canonical(self) -> str:
        """The one spelling of what the plan does: sorted keys, no spaces, no reasons, no part that cuts nothing."""
        body: dict[str, Any] = {
            "format": FORMAT, "removed": {g: list(r) for g, r in self.removed.items()}, "widths": dict(self.widths),
        }  # fmt: skip
        if self.blocks:
            body["blocks"] = {layer: blocks.body() for layer, blocks in self.blocks.items()}
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    def to_json(self) -> str:
        """The plan with its reasons and fingerprint, for a file."""
        body = json.loads(self.canonical()) | {"reasons": dict(self.reasons), "fingerprint": self.fingerprint}
        return json.dumps(body, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read ``to_json``; PruneError where the text is not a plan or was altered."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PruneError(f"this is not a plan: {error!r}") from error
        return cls.from_dict(body)

    @classmethod
    def from_dict(cls, body: Any) -> "Plan":
        """The plan of ``to_json``'s values, types and sizes checked; PruneError where they are none or were altered."""
        try:
            widths = {_name(group): _whole(width, 1) for group, width in body["widths"].items()}
            removed = {_name(group): tuple(map(_whole, gone)) for group, gone in body["removed"].items()}
            reasons = {_name(group): _name(why) for group, why in body.get("reasons", {}).items()}
            blocks = {_name(layer): _blocks(parts) for layer, parts in body.get("blocks", {}).items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, PruneError):
                raise
            raise PruneError(f"this is not a plan: {shown(error)}") from error
        plan = cls(removed, widths, reasons, blocks)
        if body.get("format") != FORMAT:
            raise PruneError(
                f"plan format {shown(body.get('format'))} is not known; this version reads format {FORMAT}"
            )
        if body.get("fingerprint", plan.fingerprint) != plan.fingerprint:
            raise PruneError("the plan's fingerprint does not match its content: the file was altered or cut short")
        return plan

    def then(self, later: "Plan", graph: DependencyGraph | None = None) -> "Plan":
        """This plan followed by one made on the network it left, as one plan in dense coordinates.

        Args:
            later: widths and blocks are those of the network that this plan leaves.
            graph: of the dense network; needed where ``later`` cuts blocks.
        """
        if self.counts != dict(later.widths):
            raise PruneError("the later plan was not made on the network that this plan leaves: group widths differ")
        removed = dict(self.removed)
        for group, gone in later.removed.items():
            stays = self.kept(group)
            removed[group] = tuple(sorted({*removed.get(group, ()), *(stays[i] for i in gone)}))
        blocks = dict(self.blocks)
        if later.blocks:
            if graph is None:
                raise PruneError("the later plan cuts blocks: composing needs the channels of the dense network")
            places = remaining_positions(graph, self.removed)
            for layer, cut in later.blocks.items():
                moved = cut.to_dense(places[layer, "out"], places[layer, "in"])
                blocks[layer] = blocks[layer].union(moved) if layer in blocks else moved
        return Plan(removed, self.widths, {g: r for g, r in later.reasons.items() if g not in removed}, blocks)


def _whole(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= WIDEST:
        raise PruneError(f"this is not a plan: {shown(value)} is no width or channel up to {WIDEST:,}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise PruneError(f"this is not a plan: {shown(value)} is no text")
    return value


def _blocks(parts: Any) -> WeightBlocks:
    rows, columns, cut = ([[_whole(i) for i in part] for part in parts[key]] for key in ("rows", "columns", "cut"))
    return WeightBlocks.of(rows, columns, cut)
