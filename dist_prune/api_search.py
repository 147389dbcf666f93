"""The library's search: how many channels each group keeps, judged on held-out images or by a knapsack.

    plan = dp.search(model, scores, graph, held_out, target={"macs": 0.5}, candidates=200)

docs/search.md says what a search does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from dist_prune import tasks
from dist_prune.api_checks import check_choice, check_count, check_types
from dist_prune.data.sample_loader import SampleLoader
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.base import is_ranking
from dist_prune.methods.scores import Scores
from dist_prune.models.wrappers import unwrap
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.network_output import num_logits
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.first_candidates import ratio_search
from dist_prune.pruning.selection.keywords import read_keywords
from dist_prune.pruning.selection.knapsack import select_by_knapsack
from dist_prune.pruning.selection.ratio_search import Counts, best_of
from dist_prune.scoring.candidate_judge import CandidateJudge
from dist_prune.scoring.library_context import check_same_network
from dist_prune.tasks.base import Task
from dist_prune.tasks.outputs import main_output
from dist_prune.training.tracking import Tracker


def search(
    model: nn.Module,
    scores: Scores,
    graph: DependencyGraph,
    loader: Iterable[Any] | Dataset[Any] | None = None,
    *,
    target: Mapping[str, float],
    solver: Literal["evolution", "knapsack"] = "evolution",
    candidates: int = 200,
    repair_images: int = 200,
    micro_batch: int = 100,
    seed: int = 0,
    task: str | Task = "classification",
    verbose: bool = False,
    group: Any = None,
    **select: Any,
) -> Plan:
    """Search for the number of channels that each group keeps; the scores give the order inside a group.

    Under torchrun all ranks call it alike, judge different networks, and get the same plan.

    Args:
        model: the network that was traced and scored, perhaps wrapped. It is not changed.
        scores: of ``score``, by a ranking method.
        graph: of ``trace``.
        loader: images with labels that nothing was trained on, as in ``score``, and no test images: they choose the
            network. ``repair_images`` of them, at most half, recalibrate batch norms; all others judge. Without a
            loader only the knapsack can be solved.
        target: share of one cost of the dense network that is kept, as in ``select``; also ``{"memory": 0.7}``.
        solver: ``evolution``: networks are cut and judged, the best are varied; ``knapsack``: the largest sum of
            scores within the target.
        candidates: number of networks of the evolution. The first is the uniform plan.
        repair_images: number of images for batch norms, drawn by ``seed``.
        micro_batch: images of one forward pass.
        seed: draws candidates and images.
        task: name of a task or a task; its primary figure judges.
        verbose: print progress on the first rank.
        group: process group of torch.distributed whose ranks search together; None for all processes.
        **select: keys of a recipe's ``select`` section: ``round_to``, ``max_ratio``, ``min_channels``,
            ``keep_ratios``, ``include``, ``exclude``.

    Returns:
        The plan; on the judging images it is not worse than the uniform one. The same on every rank.

    Raises:
        PruneError: the method is no ranking, a key is unknown, the target cannot be reached, or images are missing.

    Example:
        >>> plan = dp.search(model, scores, graph, loader, target={"macs": 0.5}, candidates=3, repair_images=4)
        >>> dp.costs(graph, plan)["macs"] <= 0.5 * dp.costs(graph)["macs"]
        True
    """
    check_types(model=(model, nn.Module), scores=(scores, Scores), graph=(graph, DependencyGraph))
    check_choice("solver", solver, ("evolution", "knapsack"))
    for name, count in (("candidates", candidates), ("micro_batch", micro_batch)):
        check_count(name, count)
    check_count("repair_images", repair_images, least=0)
    method = scores.method
    if not is_ranking(method):
        raise PruneError(
            f"search: {type(method).__module__.rpartition('.')[2]} gives no order of importance inside a group; score "
            "by a ranking method such as taylor, fisher or l1"
        )
    request, exclude, _ = read_keywords(select, target, seed)
    if request.cost is not None and request.cost.measured:
        raise PruneError(
            f"target.{request.cost.name}: measured costs are searched by a run (select.search in a recipe); "
            "select(..., model=model) meets such a target without a search"
        )
    if request.depth:
        raise PruneError("depth: search chooses among channels alone; select(..., depth=True) takes blocks as well")
    if request.target is None:
        raise PruneError('target: a search needs one, for example target={"macs": 0.5}')
    ready = method.prepare(method.prunable(graph), exclude, request)
    importance = cast(Any, method).importance(scores, ready)
    if solver == "knapsack":
        kept = select_by_knapsack(ready, importance, request, method.options.normalise)
        return replace(Plan.from_kept(ready, kept), graph=graph)
    if loader is None:
        raise PruneError("loader: candidates are judged on images; give held-out ones, or solver='knapsack'")
    bare = unwrap(model)
    weight = next(bare.parameters())
    comm = Communicator.of(group, weight.device)
    comm.connect(1800)
    check_same_network(bare, graph, comm)
    learned = tasks.build({"name": task}) if isinstance(task, str) else task
    samples = SampleLoader(loader, comm, weight.device, weight.dtype, learned.targets)
    _count_outputs(bare, samples, learned)
    repaired, judged = _split(samples.ids, repair_images, seed)
    orders = method.orders(scores, ready, request)

    def plan_of(counts: Counts) -> Plan:
        kept = {g.name: sorted(orders[g.name][g.width - n :]) for g, n in zip(ready.free, counts, strict=True)}
        return Plan.from_kept(ready, kept)

    judge = CandidateJudge(
        bare, ready, plan_of, cast(Any, samples), judged, repaired, micro_batch, comm,
        Tracker(verbose and comm.is_main), learned,
    )  # fmt: skip
    made, found = judge.search(ratio_search(ready, importance, request, (), candidates, method.options.normalise))
    best = best_of(made, {number: judge.rank(judgement) for number, judgement in found.items()})[0]
    return replace(plan_of(best.counts), graph=graph)


def _count_outputs(model: nn.Module, samples: SampleLoader, task: Task) -> None:
    """Tell the loader how many classes or values the network gives; PruneError without labels that fit them."""
    with torch.no_grad(), evaluation_mode(model):
        output = model(next(samples.batches([samples.ids[:1]])).images)
    if task.is_classification:
        samples.require_labels(num_logits(output))
    else:
        samples.outputs = int(main_output(output).shape[1])


def _split(ids: np.ndarray, repair_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids for batch norms and ids that judge, apart and ascending."""
    order = np.random.default_rng([seed, 0x5EA2C4]).permutation(ids)
    count = min(repair_images, len(ids) // 2)
    return np.sort(order[:count]), np.sort(order[count:])
