"""Costs of a network: what a target may ask for and what reports show, dense and pruned by the same counting rule.

``COSTS`` is the list that recipes, budgets, rounds, checks, reports and comparisons derive from: another kind of cost
is one ``register(Cost(...))``. It is arithmetic on widths.

``macs``: multiply-accumulates of convolutions and linear layers.
``thop``: the operations of thop 0.1.1: convolutions without bias, linear layers, 4 per element of an affine batch
norm, average pools; layers of a type that thop does not know by its exact class count nothing.
``thop_old``: the operations of thop before 0.1: convolutions with 1 per output element for a bias, linear layers, 2 per
element of a batch norm, adaptive average pools (others nothing); of whatever class.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from dist_prune.config.target import SETTINGS, Target
from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph, LatencyTable, Layer

Rule = Literal["macs", "thop", "thop_old"]
STEP = 8  # what devices like, of kept channels
BY_MACS = 0.1  # the part of a predicted time that follows multiplications


@dataclass(frozen=True)
class Cost:
    """One kind of cost of a network, by one counting rule.

    Attributes:
        name: key of ``COSTS``, of the recipe's ``target`` section and of reports.
        count: the counting rule: (dependency graph, kept channels by group; missing: all) -> amount for one image, in
            units of 1.
        unit: what is counted, in the plural, as sentences and axes say it.
        title: head of a column of a table; empty: no table of a report has it.
        prefix: the tables' power of ten: empty, ``k``, ``M`` or ``G``.
        target: whether a recipe may ask for a share of it (``target.<name>``).
        figure: whether it is a figure of a whole network, written to metrics.json.
        summary: whether ``dist-prune check`` and ``dist-prune plan`` show that figure.
        measured: whether it has to be measured on the device before ``count`` can tell it.
        step: kept channels of wide groups are a multiple of it under a target that names this cost.
        tolerance: key of the recipe's ``target`` section with the share by which a network may miss its target.
        decided_by: other keys of the recipe that decide how it is measured.
    """

    name: str
    count: Callable[[DependencyGraph, Mapping[str, int]], float]
    unit: str
    title: str = ""
    prefix: Literal["", "k", "M", "G"] = ""
    target: bool = True
    figure: bool = True
    summary: bool = True
    measured: bool = False
    step: int = 1
    tolerance: str = "tolerance"
    decided_by: tuple[str, ...] = ()

    def of(self, graph: DependencyGraph, kept: Mapping[str, int] | None = None) -> float:
        """The amount of the network whose groups keep ``kept[group]`` channels (missing: all)."""
        return self.count(graph, kept or {})

    def share(self, graph: DependencyGraph, kept: Mapping[str, int]) -> float:
        """The share of the dense network's amount that is left; groups that ``kept`` does not name stay as they are."""
        dense, now = graph.origin or graph, {group.name: group.width for group in graph.groups}
        return self.of(dense, now | dict(kept)) / self.of(dense)

    def known(self, graph: DependencyGraph) -> bool:
        """Whether ``of`` can tell the amount: times have to be measured before."""
        return not self.measured or graph.latency is not None

    @property
    def divisor(self) -> float:
        """What an amount is divided by in tables."""
        return {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[self.prefix]

    @property
    def label(self) -> str:
        """Head of a column of amounts."""
        return self.title + (f" ({self.prefix})" if self.prefix else "")


COSTS: dict[str, Cost] = {}


def register(cost: Cost) -> None:
    """Add a cost to ``COSTS``, and where it may be a target its name to the keys of the recipe's ``target`` section.

    Raises:
        PruneError: the name is taken, by another cost or by another key of that section.
    """
    if cost.name in COSTS or cost.name in SETTINGS:
        taken = ", ".join([*COSTS, *SETTINGS])
        raise PruneError(f"{cost.name!r} is no name for another cost. Taken are {taken}; choose one that is not")
    COSTS[cost.name] = cost
    if cost.target and cost.name not in Target.model_fields:
        Target.costs[cost.name] = f"share of the dense {cost.unit} to keep"


def counted_costs() -> list[Cost]:
    """The costs that a target may name and that arithmetic tells: nothing has to be measured."""
    return [cost for cost in COSTS.values() if cost.target and not cost.measured]


def report_costs() -> list[Cost]:
    """The costs that the tables of reports have a row or a column of, in order."""
    return [cost for cost in COSTS.values() if cost.title]


def target_keys(*others: str) -> str:
    """The recipe's keys of ``countable`` costs and ``others``, as a sentence lists them."""
    *names, last = [*(f"target.{cost.name}" for cost in counted_costs()), *others]
    return f"{', '.join(names)} or {last}"


def _reach(layer: Layer, width_in: int) -> int:
    """Input channels that one filter sees; grouped convolutions lose whole groups."""
    return width_in if layer.groups == 1 else layer.width_in // layer.groups


def _macs(layer: Layer, width_in: int, width_out: int) -> int:
    if layer.kind == "conv":
        return width_out * _reach(layer, width_in) * layer.kernel * layer.positions
    if layer.kind == "linear":
        return width_in * width_out * layer.positions
    return 0


def macs(graph: DependencyGraph, kept: Mapping[str, int] | None = None, rule: Rule = "macs") -> int:
    """Operations of one image when each group keeps ``kept[group]`` channels (missing: all)."""
    widths, total = graph.widths(kept or {}), 0
    for name, layer in graph.layers.items():
        width_in, width_out = widths[name]
        if layer.kind in ("conv", "linear"):
            total += _macs(layer, width_in, width_out) * (int(layer.thop) if rule == "thop" else 1)
        if rule == "thop_old":
            total += int(_old(layer) * width_out)
        elif layer.kind in ("norm", "pool") and rule == "thop":
            total += int(layer.thop * width_out)
    return total


def weights(graph: DependencyGraph, kept: Mapping[str, int] | None = None) -> int:
    """Weights of convolutions and linear layers, without biases and norms."""
    return params(graph, kept, kernels_only=True)


def _old(layer: Layer) -> float:
    """What thop before 0.1 charges per output channel beside multiplications."""
    if layer.kind == "pool":  # thop 0.1.1 charges 1 per output element of a plain pool, at least 2 of an adaptive one
        return layer.thop if layer.thop > layer.positions else 0.0
    return float({"conv": layer.bias, "norm": 2, "linear": 0, "table": 0}[layer.kind] * layer.positions)


def params(graph: DependencyGraph, kept: Mapping[str, int] | None = None, kernels_only: bool = False) -> int:
    """Parameters (not buffers) of the network when each group keeps ``kept[group]`` channels."""
    widths, total = graph.widths(kept or {}), 0 if kernels_only else graph.other_params
    for name, layer in graph.layers.items():
        width_in, width_out = widths[name]
        total += 0 if kernels_only else layer.bias * width_out
        if layer.kind in ("conv", "linear"):
            total += width_out * _reach(layer, width_in) * layer.kernel
    return total


def time_share(graph: DependencyGraph, kept: Mapping[str, int]) -> float:
    """The predicted share of the dense network's time when each group keeps ``kept[group]`` channels, corrected by the
    whole networks that were measured."""
    assert graph.latency is not None
    return graph.latency.correct(raw_time(graph, graph.latency, kept))


def raw_time(graph: DependencyGraph, table: LatencyTable, kept: Mapping[str, int]) -> float:
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
    return 1 - (1 - BY_MACS) * saved - BY_MACS * (1 - macs(graph, kept) / macs(graph))


def free_channels(graph: DependencyGraph, kept: Mapping[str, int]) -> int:
    """Channels of the groups that may be cut."""
    return sum(kept.get(group.name, group.width) for group in graph.free)


for _cost in (
    Cost("macs", macs, "MACs", "MACs", "M", step=STEP),
    Cost("thop", partial(macs, rule="thop"), "MACs by thop", target=False),
    Cost("thop_old", partial(macs, rule="thop_old"), "MACs by thop before 0.1", target=False, summary=False),
    Cost("params", params, "parameters", "params", "k"),
    Cost("channels", free_channels, "channels", figure=False),
    Cost(
        "latency", time_share, "time of a forward pass", figure=False, measured=True, step=STEP,
        tolerance="latency_tolerance", decided_by=("report.latency_repeats", "report.threads"),
    ),
):  # fmt: skip
    register(_cost)
