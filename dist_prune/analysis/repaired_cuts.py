"""Networks that lose channels of one group and are then repaired in closed form, judged on the images of the curves."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.parallel_map import map_cached
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.fileio import canonical, digest
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.masked_accuracy import Batches
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import surgeon
from dist_prune.stages.calibration import repairer_of
from dist_prune.training.tracking import Tracker

RECORD = "repaired_curves.jsonl"
Cut = tuple[str, tuple[int, ...]]  # group, removed channels


def repaired_top1(
    context: RunContext,
    graph: DependencyGraph,
    model: nn.Module,
    cuts: Sequence[Cut],
    batches: Batches,
    ids: np.ndarray,
    split: str,
    identity: str,
    count: Callable[[Tensor, Tensor], Tensor],
) -> dict[Cut, float]:
    """Cut, repair and judge a network for each cut. All ranks call it and share the cuts; recorded ones are reused.

    Args:
        context: The run, whose recipe has a ``repair.method``.
        graph: Of the network.
        model: The network, on the device; not changed.
        cuts: The cuts.
        batches: Images and labels, from a micro-batch on.
        ids: (n,) ids of these images; they do not repair.
        split: Their split; training images repair, so only ``held_out`` ones have to be kept apart.
        identity: Of what else decides the figures.
        count: From logits (1, n, classes) and labels to (1, k) integers: the first the correct, the third all images.

    Returns:
        Cut -> top-1 in percent.
    """
    settings = context.recipe.repair
    apart = ids if split == "held_out" else None
    repairer = repairer_of(context, Communicator(), apart=apart)  # a job is one rank's own
    repairer.tracker = Tracker(False)
    key = [settings.method, settings.ridge, settings.micro_batch, repairer.ids.tolist()]
    jobs = {(name, digest(canonical(list(removed)))[:32]): (name, removed) for name, removed in dict.fromkeys(cuts)}

    def run(job: tuple[str, str]) -> list[int]:
        name, removed = jobs[job]
        kept = {g.name: [c for c in range(g.width) if g.name != name or c not in removed] for g in graph.free}
        plan, small = Plan.from_kept(graph, kept), copy.deepcopy(model)
        surgeon.apply_plan(small, graph, plan)
        repairer.run(model, small, graph, plan)
        with torch.no_grad(), evaluation_mode(small):
            return sum(count(small(x)[None], y)[0] for x, y in batches(0)).tolist()  # type: ignore[union-attr]

    comm = context.environment.comm
    record = ResultCache(context.run_dir / RECORD, digest(canonical([identity, key])), comm)
    meter = context.tracker.meter(len(jobs), "repaired curves")
    results = map_cached(list(jobs), run, comm, record, "repaired curves", progress=meter.update)
    meter.close()
    return {jobs[job]: 100 * found[0] / found[2] for job, found in zip(jobs, results, strict=True)}
