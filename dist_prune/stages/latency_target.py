"""A latency target (part of the stage ``select``): measure the groups' channels, search a plan, measure its network.

dense.safetensors -> latency.json (the measured times of each group, reused if nothing has changed)
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dist_prune.distributed.cpu_count import threads
from dist_prune.fileio import canonical, digest, read_json, write_atomic
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.graph.known_costs import LatencyTable
from dist_prune.pruning.plan.plan import Plan
from dist_prune.scoring.network_times import GroupTimes, NetworkTimes, missed_time

TABLE = "latency.json"


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
    comm, target = context.environment.comm, context.recipe.target
    assert target.latency is not None
    measured = network_times(context, graph)
    times = comm.broadcast_object(comm.run_on_main(lambda: _table(context, measured)))
    return measured.search(times or {}, target.latency, target.latency_tolerance, choose)


def network_times(context: RunContext, graph: DependencyGraph) -> NetworkTimes:
    """What measures networks of a run as its recipe says.

    Args:
        context: The run.
        graph: Dependency graph of the dense network.
    """
    return NetworkTimes(
        context.networks.load_dense().eval(), graph, context.selection, context.environment,
        context.recipe.target.latency_batch, context.recipe.report.latency_repeats,
        context.recipe.report.threads or threads(), lambda text: context.tracker.info(f"  {text}"),
    )  # fmt: skip


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
    reason = missed_time(timed, target.latency, target.latency_tolerance) if target.latency is not None else ""
    if not reason:
        return ""
    if not timed["reliable"]:
        return (
            f"target.latency: {reason}. Run it again on an idle one, with another report.latency_repeats (it was "
            f"{timed['repeats']}): it is measured again then."
        )
    step_sizes = sorted({context.selection.multiple(group) for group in context.networks.graph.free})
    steps = f"; channels go in steps of {step_sizes[-1]} (select.round_to)" if step_sizes and step_sizes[-1] > 1 else ""
    return (
        f"target.latency: {reason}{steps}. Move the target, take a larger target.latency_batch, or raise "
        "target.latency_tolerance (null: never refused)."
    )


def _table(context: RunContext, measured: NetworkTimes) -> GroupTimes:
    """Times of the groups; read from the run directory if nothing has changed."""
    recipe, file = context.recipe, context.run_dir / TABLE
    key = digest(
        canonical(
            {
                "backbone": [recipe.backbone.name, recipe.backbone.kwargs, list(measured.graph.example)],
                "widths": measured.widths(),
                "batch": measured.batch,
                "device": str(context.environment.device),
                "threads": measured.threads,
                "repeats": measured.repeats,
            }
        )
    )
    body = read_json(file)
    if body.get("key") == key and body.get("digest") == digest(canonical(body.get("times"))):
        return body["times"]
    times = measured.of_groups()
    write_atomic(file, json.dumps({"key": key, "digest": digest(canonical(times)), "times": times}, indent=1))
    return times
