"""Networks that lose channels of one group and are then repaired in closed form, judged on the images of the curves."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from dist_prune.analysis.cut_judges import Judge, Judged, plan_of_cut
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.parallel_map import map_cached
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.fileio import canonical, digest
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.surgery import surgeon
from dist_prune.stages.calibration import repairer_of
from dist_prune.training.tracking import Tracker

RECORD = "repaired_curves.jsonl"
Cut = tuple[str, tuple[int, ...]]  # group, removed channels


def repaired_results(
    context: RunContext,
    graph: DependencyGraph,
    model: nn.Module,
    cuts: Sequence[Cut],
    judge: Judge,
    ids: np.ndarray,
    split: str,
    identity: str,
) -> dict[Cut, Judged]:
    """Cut, repair and judge a network for each cut. All ranks call it and share the cuts; recorded ones are reused.

    Args:
        context: The run, whose recipe has a ``repair.method``.
        graph: Of the network.
        model: The network, on the device; not changed.
        cuts: The cuts.
        judge: Judges a network on the images of the curves.
        ids: (n,) ids of these images; they do not repair.
        split: Their split; training images repair, so only ``held_out`` ones have to be kept apart.
        identity: Of what else decides the figures.

    Returns:
        Cut -> what is known of it after the repair.
    """
    settings = context.recipe.repair
    apart = ids if split == "held_out" else None
    repairer = repairer_of(context, Communicator(), apart=apart)  # a job is one rank's own
    repairer.tracker = Tracker(False)
    key = [settings.method, settings.ridge, settings.micro_batch, repairer.ids.tolist()]
    jobs = {(name, digest(canonical(list(removed)))[:32]): (name, removed) for name, removed in dict.fromkeys(cuts)}

    def run(job: tuple[str, str]) -> list[Any]:
        name, removed = jobs[job]
        plan, small = plan_of_cut(graph, name, removed), copy.deepcopy(model)
        surgeon.apply_plan(small, graph, plan)
        repairer.run(model, small, graph, plan)
        return judge.network(small)

    comm = context.environment.comm
    record = ResultCache(context.run_dir / RECORD, digest(canonical([identity, key])), comm)
    meter = context.tracker.meter(len(jobs), "repaired curves")
    results = map_cached(list(jobs), run, comm, record, "repaired curves", progress=meter.update)
    meter.close()
    return {jobs[job]: judge.read(found) for job, found in zip(jobs, results, strict=True)}
