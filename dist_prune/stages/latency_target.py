"""A latency target (part of the stage ``select``): measure the groups' channels, search a plan, measure its network.

dense.safetensors -> latency.json (the measured times of each group, reused if nothing has changed)
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from dist_prune.distributed.cpu_count import threads
from dist_prune.fileio import canonical, digest, read_json, write_atomic
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, LatencyTable
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.latency_search import LatencySearch, Times, isotonic
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.training.latency import ROUNDS, measure_latency
from dist_prune.training.timing_noise import is_reliable

TABLE = "latency.json"
SHARES = (0.75, 0.5, 0.25)  # shares of a group's width that are measured, beside the dense width and the floor


def search_latency(
    context: RunContext, graph: DependencyGraph, choose: Callable[[DependencyGraph], Plan]
) -> tuple[Plan, dict[str, Any]]:
    """Find the largest network whose measured time is within ``target.latency`` (see ``LatencySearch``).

    Times are measured on the first rank and depend on the machine and the moment. So of all targets this one alone can
    give different plans on different machines.

    Args:
        context: The run; its recipe has a latency target. All ranks call the function.
        graph: Dependency graph of the dense network.
        choose: Maps a graph that carries times to the method's plan.

    Returns:
        The plan, and how it was found: ``predicted`` and ``measured`` shares of the dense time, whether the time is
        ``reliable``, the ``smallest`` share measured, all that was ``tried``, and how times were measured.

    Raises:
        PruneError: No network of this recipe is that fast.
    """
    comm, recipe = context.environment.comm, context.recipe
    assert recipe.target.latency is not None
    model = context.networks.load_dense().eval()
    times = comm.broadcast_object(comm.run_on_main(lambda: _table(context, model, graph)))
    times = times or {}
    table = LatencyTable({name: tuple((int(w), float(s)) for w, s in points) for name, points in times.items()})

    def measure(plans: Mapping[str, Plan]) -> Times:
        cuts = {name: plan.removed for name, plan in plans.items()}
        return comm.broadcast_object(comm.run_on_main(lambda: _time(context, model, graph, cuts))) or {}

    floors = {group.name: list(range(context.selection.width(group, 1))) for group in graph.free}
    search = LatencySearch(
        graph,
        table,
        recipe.target.latency,
        recipe.target.latency_tolerance,
        Plan.from_kept(graph, floors),
        choose,
        measure,
        lambda text: context.tracker.info(f"  {text}"),
    )
    result = search.run()
    return result.plan, {
        "predicted": result.predicted,
        "measured": result.measured,
        "reliable": result.reliable,
        "smallest": min(trial.measured for trial in search.tried.values()),
        "tried": [[trial.predicted, trial.measured] for trial in search.tried.values()],
        "batch": recipe.target.latency_batch,
        "device": str(context.environment.device),
        "threads": _threads(context),
        "repeats": recipe.report.latency_repeats,
        "times": times,
        "bend": [*search.corrections_for(result.raw), (1.0, 1.0)],
    }


def measure_plans(context: RunContext, graph: DependencyGraph, plans: Mapping[str, Plan]) -> Times:
    """Measure pruned networks on the first rank. Collective.

    Args:
        context: The run.
        graph: Dependency graph of the dense network.
        plans: Name -> plan that removes something.

    Returns:
        Name -> share of the dense time, and whether it is reliable.
    """
    comm = context.environment.comm
    model = context.networks.load_dense().eval()
    cuts = {name: plan.removed for name, plan in plans.items()}
    return comm.broadcast_object(comm.run_on_main(lambda: _time(context, model, graph, cuts))) or {}


def with_times(graph: DependencyGraph, timed: Mapping[str, Any]) -> DependencyGraph:
    """The graph with the times that led to the plan of ``search_latency``, so that figures can repeat its selection.

    Args:
        graph: Dependency graph of the dense network.
        timed: The second result of ``search_latency``, or its copy in the ledger.
    """
    times = {name: tuple((int(w), float(s)) for w, s in points) for name, points in timed["times"].items()}
    bend = tuple((float(raw), float(share)) for raw, share in timed["bend"])
    return replace(graph, latency=LatencyTable(times, bend))


def miss_reason(context: RunContext, timed: Mapping[str, Any]) -> str:
    """Why the measured time misses the target by more than the recipe tolerates, or is unreliable; else empty.

    Args:
        context: The run.
        timed: The second result of ``search_latency``.
    """
    target = context.recipe.target
    if target.latency is None or target.latency_tolerance is None:
        return ""
    deviation = timed["measured"] / target.latency - 1
    figures = (
        f"target.latency: {target.latency:.4g} was asked for, {timed['measured']:.4g} was measured, {deviation:+.1%}"
    )
    advice = (
        "Move the target, take a larger target.latency_batch, or raise target.latency_tolerance (null: never refused)"
    )
    if not timed["reliable"]:
        return (
            f"{figures}, and that time is not reliable: other work used the machine whenever it was measured. Run it "
            f"again on an idle one, with another report.latency_repeats (it was {timed['repeats']}): it is measured "
            "again then."
        )
    if abs(deviation) <= target.latency_tolerance:
        return ""
    step_sizes = sorted({context.selection.multiple(group) for group in context.networks.graph.free})
    steps = f"; channels go in steps of {step_sizes[-1]} (select.round_to)" if step_sizes and step_sizes[-1] > 1 else ""
    return (
        f"{figures}, more than target.latency_tolerance {target.latency_tolerance:.1%}. Of {len(timed['tried'])} whole "
        f"networks that were measured none is nearer, and the fastest takes {timed['smallest']:.4g} of the dense time"
        f"{steps}. {advice}."
    )


def _threads(context: RunContext) -> int:
    return context.recipe.report.threads or threads()


def _table(context: RunContext, model: nn.Module, graph: DependencyGraph) -> dict[str, list[list[float]]]:
    """Group -> [[kept, share of the dense time], ...]; read from the run directory if nothing has changed."""
    request, file = context.selection, context.run_dir / TABLE
    widths = {group.name: measured_widths(group, request) for group in graph.free}
    recipe = context.recipe
    key = digest(
        canonical(
            {
                "backbone": [recipe.backbone.name, recipe.backbone.kwargs, list(graph.example)],
                "widths": widths,
                "batch": recipe.target.latency_batch,
                "device": str(context.environment.device),
                "threads": _threads(context),
                "repeats": recipe.report.latency_repeats,
            }
        )
    )
    body = read_json(file)
    if body.get("key") == key and body.get("digest") == digest(canonical(body.get("times"))):
        return body["times"]
    times = {}
    for group in graph.free:
        cuts = {str(w): {group.name: tuple(range(w, group.width))} for w in widths[group.name]}
        shares = _time(context, model, graph, cuts, rounds=1)  # an estimate: whole networks are measured in more rounds
        times[group.name] = monotone([[w, shares[str(w)][0]] for w in widths[group.name]] + [[group.width, 1.0]])
    write_atomic(file, json.dumps({"key": key, "digest": digest(canonical(times)), "times": times}, indent=1))
    return times


def measured_widths(group: ChannelGroup, request: SelectionRequest) -> list[int]:
    """The widths of a group to measure, ascending, all below the dense one.

    Args:
        group: The channel group.
        request: The selection, whose floors and rounding the widths respect.
    """
    floor = request.width(group, 1)
    widths = {floor, *(request.width(group, round(group.width * share)) for share in SHARES)}
    return sorted(width for width in widths if width < group.width)


def monotone(points: list[list[float]]) -> list[list[float]]:
    """Make measured times non-decreasing in the number of channels, by isotonic regression.

    Falling neighbours are averaged. Taking the smaller of two would be a little too fast each time, and the errors of
    many groups add up.

    Args:
        points: [kept channels, share of the dense time], ascending; the last one is the dense network and stays.
    """
    shares = isotonic([share for _, share in points[:-1]])
    limit = points[-1][1]
    return [[width, min(share, limit)] for (width, _), share in zip(points, [*shares, limit], strict=True)]


def _time(
    context: RunContext,
    model: nn.Module,
    graph: DependencyGraph,
    cuts: Mapping[str, Mapping[str, tuple[int, ...]]],
    rounds: int = ROUNDS,
) -> dict[str, tuple[float, bool]]:
    """Share of the dense time of pruned networks, and whether it is reliable; measured in turns with the dense one."""
    if not cuts:
        return {}
    models = {"": model}
    for name, removed in cuts.items():
        models[name] = copy.deepcopy(model)
        widths = {group.name: group.width for group in graph.groups}
        surgeon.apply_plan(
            models[name], graph, Plan({g: tuple(channels) for g, channels in removed.items() if channels}, widths)
        )
    recipe, batch = context.recipe, context.recipe.target.latency_batch
    shape = tuple(context.images.example_input.shape[1:])
    device, repeats = context.environment.device, recipe.report.latency_repeats
    latencies = measure_latency(models, shape, (batch,), repeats, device, _threads(context), rounds=rounds)
    at_batch = {name: batches[str(batch)] for name, batches in latencies.items()}
    dense_reliable = is_reliable(at_batch[""])
    return {
        name: (at_batch[name]["ms"] / at_batch[""]["ms"], dense_reliable and is_reliable(at_batch[name]))
        for name in cuts
    }
