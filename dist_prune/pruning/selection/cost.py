"""Costs of a network, for targets and reports. Dense and pruned networks are counted by the same rule.

Recipes, budgets, rounds, checks, reports and comparisons all read the table ``COSTS``; another cost is added by one
``register(Cost(...))``, or by another package's entry point in ``dist_prune.costs``. Counting is arithmetic on widths.

``macs``: multiply-accumulates of convolutions and linear layers.
``thop``: the operations of thop 0.1.1: convolutions without bias, linear layers, 4 per element of an affine batch
norm, average pools; layers of a type that thop does not know by its exact class count nothing.
``thop_old``: the operations of thop before 0.1: convolutions with 1 per output element for a bias, linear layers, 2 per
element of a batch norm, adaptive average pools (other pools nothing); layers of any class.
``memory``: the largest sum of activations that are alive at once in a forward pass (``surgery/activation_memory.py``).
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from dist_prune import plugins
from dist_prune.config.pruning import SETTINGS, Target
from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph, Layer
from dist_prune.pruning.graph.known_costs import LatencyTable

Rule = Literal["macs", "thop", "thop_old"]
STEP = 8  # kept channels of wide groups are a multiple of it, because devices run such widths faster
BY_MACS = 0.1  # part of a predicted time that is proportional to the MACs


@dataclass(frozen=True)
class Cost:
    """One kind of cost of a network, by one counting rule.

    ``COSTS["macs"].of(graph, {"conv1": 12})`` counts the MACs per image of a network whose group ``conv1`` keeps 12
    channels and whose other groups keep all.

    Attributes:
        name: key of ``COSTS``, of the recipe's ``target`` section and of reports.
        count: the counting rule: (dependency graph, group -> number of kept channels; missing: all) -> amount for one
            image, in units of 1.
        unit: name of the unit in the plural, for sentences and axes.
        title: head of the cost's column in tables of reports; empty: in no table.
        prefix: power of ten in tables: empty, ``k``, ``M`` or ``G``.
        target: whether a recipe may ask for a share of it (``target.<name>``).
        figure: whether metrics.json has it for the whole network.
        summary: whether ``dist-prune check`` and ``dist-prune plan`` show it.
        measured: whether it has to be measured on the device before ``count`` can be called.
        on_demand: whether it is counted only where a target or a search asks for it, because counting runs the network.
        step: kept channels of wide groups are a multiple of it under a target that names this cost.
        tolerance: key of the recipe's ``target`` section with the share by which a network may miss its target.
        decided_by: other recipe keys that change how it is measured.
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
    on_demand: bool = False
    step: int = 1
    tolerance: str = "tolerance"
    decided_by: tuple[str, ...] = ()

    def of(self, graph: DependencyGraph, kept: Mapping[str, int] | None = None) -> float:
        """Count the amount of the network whose groups keep ``kept[group]`` channels (missing: all), for one image."""
        return self.count(graph, kept or {})

    def share(self, graph: DependencyGraph, kept: Mapping[str, int]) -> float:
        """Compute the share of the dense network's amount that is left.

        Args:
            graph: dependency graph of the network, dense or pruned in earlier rounds.
            kept: group -> number of kept channels; groups that are absent keep all that ``graph`` has.
        """
        dense = graph.origin or graph
        return self.of(dense, graph.present | dict(kept)) / self.of(dense)

    def known(self, graph: DependencyGraph) -> bool:
        """Whether ``of`` can be called: a measured cost needs the graph's latency table."""
        return not self.measured or graph.latency is not None

    @property
    def divisor(self) -> float:
        """Divisor of amounts in tables."""
        return {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[self.prefix]

    @property
    def label(self) -> str:
        """Head of a column of amounts, with the prefix."""
        return self.title + (f" ({self.prefix})" if self.prefix else "")


class _Costs(MutableMapping[str, Cost]):
    """Name -> cost; those of other packages join when it is first read, in the order of their names."""

    def __init__(self) -> None:
        self.known: dict[str, Cost] = {}
        self.joined = False

    def _all(self) -> dict[str, Cost]:
        if not self.joined:
            self.joined = True  # first: a package may read the table while it is imported
            plugins.load_all("cost", _register_plugin)
        return self.known

    def __getitem__(self, name: str) -> Cost:
        known = self._all()
        if name not in known and (why := plugins.why_unusable("cost", name)):
            raise PruneError(why)
        return known[name]

    def __setitem__(self, name: str, cost: Cost) -> None:
        self.known[name] = cost

    def __delitem__(self, name: str) -> None:
        del self.known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


COSTS = _Costs()


def _register_plugin(plugin: plugins.Plugin, cost: Any) -> None:
    """Add the cost of another package."""
    own = "dist_prune/pruning/selection/cost.py" if plugin.name in COSTS.known else ""
    plugins.find("cost", plugin.name, own or ("a key of target" if plugin.name in SETTINGS else ""))
    if not isinstance(cost, Cost) or cost.name != plugin.name:
        kind = f"a cost named {cost.name!r}" if isinstance(cost, Cost) else f"a {type(cost).__name__}"
        raise PruneError(f"{plugin} is {kind}, not a dist_prune.Cost named {plugin.name!r} like its entry point")
    if cost.measured or not cost.target:
        raise PruneError(f"{plugin} has measured=True or target=False, which costs of other packages cannot have")
    register(replace(cost, count=partial(_count, plugin, cost.count)))


def _count(
    plugin: plugins.Plugin, rule: Callable[[DependencyGraph, Mapping[str, int]], float], graph: DependencyGraph,
    kept: Mapping[str, int],
) -> float:  # fmt: skip
    """The amount by the rule of another package; a PruneError with its name if the rule fails."""
    try:
        return rule(graph, kept)
    except Exception as error:
        raise PruneError(f"{plugin} cannot count this network: {type(error).__name__}: {error}") from error


def register(cost: Cost) -> None:
    """Add a cost to ``COSTS``; if it may be a target, its name becomes a key of the recipe's ``target`` section.

    Raises:
        PruneError: another cost or another key of that section has the name.
    """
    if cost.name in COSTS.known or cost.name in SETTINGS:
        taken = ", ".join([*COSTS, *SETTINGS])
        raise PruneError(f"{cost.name!r} is no name for another cost. Taken are {taken}; choose one that is not")
    COSTS[cost.name] = cost
    if cost.target and cost.name not in Target.model_fields:
        Target.costs[cost.name] = f"share of the dense {cost.unit} to keep"


def counted_costs(asked: Cost | None = None) -> list[Cost]:
    """Return the costs that a target may name and that need no measurement, of those on demand ``asked`` alone."""
    countable = [cost for cost in COSTS.values() if cost.target and not cost.measured]
    return [cost for cost in countable if not cost.on_demand or cost is asked]


def searched_costs(asked: Cost | None) -> list[Cost]:
    """Return the costs that the lines of a search show: those of reports, and ``asked`` if it is counted on demand."""
    return [*report_costs(), *([asked] if asked is not None and asked.on_demand else [])]


def report_costs() -> list[Cost]:
    """Return the costs that tables of reports show, in order."""
    return [cost for cost in COSTS.values() if cost.title]


def target_keys(*others: str) -> str:
    """List the recipe's keys of all costs that need no measurement, and ``others``, for a sentence."""
    countable = (cost for cost in COSTS.values() if cost.target and not cost.measured)
    *names, last = [*(f"target.{cost.name}" for cost in countable), *others]
    return f"{', '.join(names)} or {last}"


def _macs(layer: Layer, width_in: int, width_out: int) -> int:
    if layer.kind == "conv":
        return width_out * layer.filter_inputs(width_in) * layer.kernel * layer.positions
    if layer.kind == "linear":
        return width_in * width_out * layer.positions
    return 0


def macs(graph: DependencyGraph, kept: Mapping[str, int] | None = None, rule: Rule = "macs") -> int:
    """Count the operations for one image.

    Args:
        graph: dependency graph of the network.
        kept: group -> number of kept channels (missing: all).
        rule: ``macs``, ``thop`` or ``thop_old``, as the module describes them.
    """
    widths, total = graph.widths(kept or {}), 0
    for name, layer in graph.layers.items():
        width_in, width_out = widths[name]
        if layer.kind in ("conv", "linear"):
            count = _macs(layer, width_in, width_out)
            total += round(count * layer.thop) if rule == "thop" else count
        if rule == "thop_old":
            total += int(_thop_old_per_channel(layer) * width_out)
        elif layer.kind in ("norm", "pool") and rule == "thop":
            total += int(layer.thop * width_out)
    return total


def layer_macs(graph: DependencyGraph, kept: Mapping[str, int] | None = None) -> dict[str, int]:
    """Count the multiply-accumulates of each convolution and linear layer for one image, in the order of the graph.

    Args:
        graph: dependency graph of the network.
        kept: group -> number of kept channels (missing: all).

    Returns:
        Module path -> MACs; their sum is ``macs``.
    """
    widths = graph.widths(kept or {})
    layers = {name: layer for name, layer in graph.layers.items() if layer.kind in ("conv", "linear")}
    return {name: _macs(layer, *widths[name]) for name, layer in layers.items()}


def weights(graph: DependencyGraph, kept: Mapping[str, int] | None = None) -> int:
    """Count the weights of convolutions and linear layers, without biases and norms."""
    return params(graph, kept, kernels_only=True)


def _thop_old_per_channel(layer: Layer) -> float:
    """Return the operations per output channel that thop before 0.1 counts besides multiplications."""
    if layer.kind == "pool":  # thop 0.1.1 counts 1 per output element of a plain pool, at least 2 of an adaptive one
        return layer.thop if layer.thop > layer.positions else 0.0
    return float({"conv": min(layer.bias, 1), "norm": 2}.get(layer.kind, 0) * (layer.places or layer.positions))


def params(graph: DependencyGraph, kept: Mapping[str, int] | None = None, kernels_only: bool = False) -> int:
    """Count the parameters (not buffers) of the network.

    Args:
        graph: dependency graph of the network.
        kept: group -> number of kept channels (missing: all).
        kernels_only: count weights of convolutions and linear layers only.
    """
    kept = kept or {}
    widths, total = graph.widths(kept), 0 if kernels_only else graph.other_params
    if not kernels_only:
        total -= sum(block.other_params for block in graph.blocks if kept.get(block.key) == 0)
    return total + sum(layer.params(*widths[name], kernels_only) for name, layer in graph.layers.items())


def time_share(graph: DependencyGraph, kept: Mapping[str, int]) -> float:
    """Predict the share of the dense network's time, corrected by the whole networks that were measured.

    Args:
        graph: dependency graph of the dense network, with a latency table.
        kept: group -> number of kept channels (missing: all).
    """
    assert graph.latency is not None
    return graph.latency.correct(raw_time(graph, graph.latency, kept))


def raw_time(graph: DependencyGraph, table: LatencyTable, kept: Mapping[str, int]) -> float:
    """Add up the time that each group saves alone, as a share of the dense time that is left.

    The result orders networks but predicts no time: groups of the same layer save a part of it twice, and the sum may
    fall below zero. Fewer channels always have a smaller result, because a small part is proportional to the MACs
    whatever was measured; so a search between two networks makes progress. ``LatencyTable.correct`` turns the result
    into a prediction.

    Args:
        graph: dependency graph of the dense network.
        table: measured times of its groups.
        kept: group -> number of kept channels (missing: all).
    """
    saved = 0.0
    for name, points in table.times.items():
        count = kept.get(name, points[-1][0])
        if count < points[-1][0]:
            widths, shares = zip(*points, strict=True)
            saved += 1 - float(np.interp(count, widths, shares))
    return 1 - (1 - BY_MACS) * saved - BY_MACS * (1 - macs(graph, kept) / macs(graph))


def peak_memory(graph: DependencyGraph, kept: Mapping[str, int]) -> int:
    """Count the bytes of the peak of activations for one image.

    Args:
        graph: dependency graph of a network that was traced in this process.
        kept: group -> number of kept channels (missing: all).

    Raises:
        PruneError: the graph knows no network, or the network cannot be counted.
    """
    if graph.memory is None:
        raise PruneError("target.memory: this dependency graph was not traced from a network; trace it again")
    return graph.memory.peak(graph.present | dict(kept))


def free_channels(graph: DependencyGraph, kept: Mapping[str, int]) -> int:
    """Count the channels of free groups; those inside blocks that are gone are gone."""
    gone = graph.inside(block.path for block in graph.blocks if kept.get(block.key) == 0)
    return sum(kept.get(group.name, group.width) for group in graph.free if group.name not in gone)


for _cost in (
    Cost("macs", macs, "MACs", "MACs", "M", step=STEP),
    Cost("thop", partial(macs, rule="thop"), "MACs by thop", target=False),
    Cost("thop_old", partial(macs, rule="thop_old"), "MACs by thop before 0.1", target=False, summary=False),
    Cost("params", params, "parameters", "params", "k"),
    Cost("channels", free_channels, "channels", figure=False),
    Cost("memory", peak_memory, "bytes of the peak of activations", figure=False, summary=False, on_demand=True),
    Cost(
        "latency", time_share, "time of a forward pass", figure=False, measured=True, step=STEP,
        tolerance="latency_tolerance", decided_by=("report.latency_repeats", "report.threads"),
    ),
):  # fmt: skip
    register(_cost)
