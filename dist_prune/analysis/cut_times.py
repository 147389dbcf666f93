"""Measured times of cut networks beside the dense one, for pages that show networks which no run has timed."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_prune.analysis.cut_judges import plan_of_cut
from dist_prune.distributed import preemption
from dist_prune.distributed.cpu_count import threads
from dist_prune.distributed.environment import processor_name
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.fileio import canonical, digest
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.stages.calibration import starting_network
from dist_prune.training.latency import WARMUP, measure_latency, synchronize
from dist_prune.training.timing_noise import speedup

RECORD = "cut_times.jsonl"
BUDGET_S = 8.0  # seconds that all passes may take; LEAST passes of each network are timed in any case
LEAST = 3
STEADY = 10  # timed passes that must fit into the budget at a batch size above the smallest
ROUNDS = 2  # a set of networks is timed once more if other work disturbed it
TOGETHER = 5  # cut networks that are timed in turns with the dense one, and held in memory at a time
Cut = Callable[[nn.Module], None]  # cuts a copy of the dense network, on its device
Figures = Mapping[str, Any]  # of one network at one batch size, as ``measure_latency`` returns them


@dataclass(frozen=True)
class CutTimes:
    """Times of cut networks, each beside that of the dense network in the same turns.

    Attributes:
        place: ``batch``, ``device``, ``machine`` (the processor's or the GPU's name), ``threads``, ``repeats``.
        figures: (set, name) -> figures of the dense and of the cut network.
    """

    place: Mapping[str, Any]
    figures: Mapping[tuple[str, str], tuple[Figures, Figures]]

    def facts(self, group: str, name: str) -> dict[str, Any]:
        """A network's times as JSON.

        Args:
            group: The set that it was timed in.
            name: Its name in the set.

        Returns:
            ``ms`` and ``dense_ms``, ``speedup`` (dense over cut; None if a time is not reliable), ``reliable``, and
            ``why`` if it is not.
        """
        dense, cut = self.figures[group, name]
        ratio, why = speedup(dense, cut), [figures["why"] for figures in (dense, cut) if "why" in figures]
        facts = {"ms": cut["ms"], "dense_ms": dense["ms"], "speedup": ratio, "reliable": ratio is not None}
        return {**facts, **({} if ratio is not None else {"why": "; ".join(why)})}


def times_of_curves(context: RunContext, widths: Mapping[str, Iterable[int]]) -> CutTimes:
    """Time each network of ratio curves. All ranks call it; the first one measures.

    Args:
        context: The run.
        widths: Group -> the numbers of channels that it is cut to, the other groups dense. Which channels go does not
            matter for the time.

    Returns:
        The times: a set for each group, in which a network's name is the number of channels.
    """
    graph = context.selection_graph()

    def cut(group: str, kept: int, model: nn.Module) -> None:
        width = graph.group(group).width
        surgeon.apply_plan(model, graph, plan_of_cut(graph, group, range(kept, width)))

    sets = {
        group: {str(kept): partial(cut, group, kept) for kept in sorted(set(several), reverse=True)}
        for group, several in widths.items()
    }
    return measure_times(context, starting_network(context), sets)


def times_of_criteria(context: RunContext, plans: Mapping[str, Plan]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Time the network of each compared criterion. All ranks call it; the first one measures.

    Args:
        context: The run.
        plans: Criterion -> its plan. Plans of the same widths are timed once.

    Returns:
        Where they were timed (``CutTimes.place``), and criterion -> its times (``CutTimes.facts``).
    """
    spec = context.recipe.backbone
    dense, example = context.networks.load_dense().eval(), context.images.example_input
    graph = trace_groups(dense, example, spec.protect, spec.streams, spec.units)

    def cut(plan: Plan, model: nn.Module) -> None:
        surgeon.apply_plan(model, graph, plan)

    keys = {name: digest(canonical([plan.counts, list(plan.blocks_removed)]))[:32] for name, plan in plans.items()}
    cuts = {keys[name]: partial(cut, plan) for name, plan in plans.items()}
    times = measure_times(context, dense, {"criteria": cuts})
    return times.place, {name: times.facts("criteria", key) for name, key in keys.items()}


def measure_times(context: RunContext, dense: nn.Module, sets: Mapping[str, Mapping[str, Cut]]) -> CutTimes:
    """Time cut networks, a few at a time, in turns with the dense network. A collective, called by every rank.

    The first rank measures while the others wait. Finished networks are recorded in the run directory, and are not
    measured again on the same machine. The batch size is the largest of ``report.latency_batches`` at which all passes
    fit into ``BUDGET_S`` seconds, else the smallest.

    Args:
        context: The run.
        dense: The dense network; not changed.
        sets: Name of a set -> name of a network -> what cuts it.
    """
    comm, device, report = context.environment.comm, context.environment.device, context.recipe.report
    shape, count = tuple(context.images.example_input.shape[1:]), report.threads or threads()
    dense = dense.to(device).eval()
    own_place: dict[str, Any] = {"device": str(device), "machine": _machine(device), "threads": count}
    place = comm.broadcast_object(own_place) or own_place  # the first rank's
    tensors = {name: list(tensor.shape) for name, tensor in dense.state_dict().items()}
    asked = [list(shape), list(report.latency_batches), report.latency_repeats]
    network = [context.recipe.backbone.name, context.recipe.backbone.kwargs, tensors]
    record = ResultCache(context.run_dir / RECORD, digest(canonical([network, asked, place])), comm)
    networks = sum(len(cuts) + -(-len(cuts) // TOGETHER) for cuts in sets.values())
    if "pace" not in record:

        def choose() -> list[int]:
            return list(_pace(dense, shape, report.latency_batches, networks, report.latency_repeats, device, count))

        record.add([("pace", comm.broadcast_object(comm.run_on_main(choose)))])
    batch, repeats = record["pace"]

    def measure(some: Sequence[tuple[str, str]]) -> dict[str, Figures]:
        models = {"dense": dense}
        for group, name in some:
            models[name] = copy.deepcopy(dense)
            sets[group][name](models[name])
        times = measure_latency(models, shape, (batch,), repeats, device, count, rounds=ROUNDS)
        return {name: figures[str(batch)] for name, figures in times.items()}

    jobs = [(group, name) for group, cuts in sets.items() for name in cuts]
    missing = [job for job in jobs if list(job) not in record]
    meter = context.tracker.meter(len(jobs), "measure times", len(jobs) - len(missing))
    while missing:
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error(f"in the times of cut networks, with {len(missing)} of {len(jobs)} to do")
        now = [job for job in missing if job[0] == missing[0][0]][:TOGETHER]  # of one set
        missing = [job for job in missing if job not in now]
        found = comm.broadcast_object(comm.run_on_main(partial(measure, now))) or {}
        record.add((list(job), [found["dense"], found[job[1]]]) for job in now)
        meter.update(len(jobs) - len(missing))
    meter.close()
    figures = {job: (record[list(job)][0], record[list(job)][1]) for job in jobs}
    return CutTimes({"batch": batch, **place, "repeats": repeats}, figures)


@torch.no_grad()
def _pace(
    dense: nn.Module,
    shape: tuple[int, ...],
    batches: Sequence[int],
    networks: int,
    repeats: int,
    device: torch.device,
    count: int,
) -> tuple[int, int]:
    """Batch size and number of timed passes of each network, from a few passes of the dense one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    least, chosen = min(LEAST, repeats), (min(batches), min(LEAST, repeats))
    try:
        for batch in sorted(batches):
            x, seconds = torch.zeros(batch, *shape, device=device), float("inf")
            for _ in range(2):
                synchronize(device)
                start = time.perf_counter()
                dense(x)
                synchronize(device)
                seconds = min(seconds, time.perf_counter() - start)
            passes = int(BUDGET_S / max(networks * seconds, 1e-9)) - WARMUP
            if passes < 2 * STEADY and batch != min(batches):
                break
            chosen = (batch, max(least, min(passes // 2, repeats)))  # a short pass is run twice
    finally:
        torch.set_num_threads(before)
    return chosen


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
