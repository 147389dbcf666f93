"""A search for each group's ratio (part of the stage ``select``): judge cut networks, keep the best, write its front.

    the network that the round starts from, round_N/scores.safetensors -> round_N/search.json

Candidates are jobs of the ranks; a stopped search resumes with the networks that it has judged.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from dist_prune.config.safe_parsing import strict_json
from dist_prune.config.search import Search
from dist_prune.data.loader import ImageLoader
from dist_prune.data.sampling import calibration_ids
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json, write_atomic
from dist_prune.methods.base import RankingMethod
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.search_checks import best_on_front
from dist_prune.pipeline.stage_graph import round_path
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import searched_costs
from dist_prune.pruning.selection.first_candidates import ratio_search
from dist_prune.pruning.selection.knapsack import select_by_knapsack
from dist_prune.pruning.selection.ranking import select_by_score
from dist_prune.pruning.selection.ratio_search import Candidate, Counts, RatioSearch, best_of, forward_passes, front_of
from dist_prune.scoring.candidate_judge import CandidateJudge, Judgement
from dist_prune.stages import latency_target
from dist_prune.stages.calibration import starting_network

PARTIAL = "partial_search"
FORMAT = 1
TIMED = 3  # networks that are measured at once for a latency target
TIMED_AT_MOST = 12


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        plan: of the best network within the recipe's target.
        facts: for the ledger and the report.
        text: search.json.
        latency: of a latency target, how the network was found (see ``latency_target.search_latency``).
    """

    plan: Plan
    facts: dict[str, Any]
    text: str
    latency: dict[str, Any]


def ranking_of(context: RunContext) -> RankingMethod:
    """The recipe's method, which has been checked to be a ranking."""
    assert isinstance(context.method, RankingMethod)
    return context.method


def knapsack_plan(context: RunContext, graph: DependencyGraph, scores: Mapping[str, Tensor]) -> Plan:
    """The plan of ``select.search.solver: knapsack``. Pure."""
    method = ranking_of(context)
    importance, request = method.importance(scores, graph), context.round_selection(graph)
    return Plan.from_kept(graph, select_by_knapsack(graph, importance, request, method.options.normalise))


def uniform_plan(context: RunContext, graph: DependencyGraph, scores: Mapping[str, Tensor]) -> Plan:
    """The plan that removes the same share of every group, within the round's target. Pure."""
    method = ranking_of(context)
    request = replace(context.round_selection(graph), scope="local")
    kept = select_by_score(graph, method.importance(scores, graph), request, method.options.normalise)
    return Plan.from_kept(graph, kept)


def ratios(graph: DependencyGraph, uniform: Plan, found: Plan) -> list[dict[str, Any]]:
    """A row for each free group: its dense width, and what the uniform plan and the found one keep."""
    return [
        {"name": g.name, "dense": g.dense, "uniform": uniform.counts[g.name], "found": found.counts[g.name]}
        for g in graph.free
    ]


def evolve(context: RunContext, graph: DependencyGraph, scores: Mapping[str, Tensor]) -> Found:
    """Search by evolution. Collective; every rank gets the same result, whatever their number.

    Args:
        context: The run; its recipe has ``select.search`` with the solver ``evolution``.
        graph: Dependency graph of the network that the round prunes.
        scores: The method's scores.

    Raises:
        PruneError: The target cannot be reached, or no judging image can be read.
        PreemptedError: The run was asked to stop; what was judged is saved.
    """
    latency: dict[str, Any] = {}
    cost = context.selection.cost
    if cost is not None and cost.measured:
        latency = _timed(context, graph, scores)
        graph = latency_target.with_times(graph, latency)
    search, judge, where = _prepare(context, graph, scores)
    made, judged = judge.search(search)
    figures = {c.number: judge.rank(judged[c.number]) for c in made}
    winners = {target: best_of([c for c in made if c.target == target], figures)[0] for target in search.targets}
    winner = winners[search.targets[0]]
    if latency:
        winner, latency = _measured_winner(context, graph, search, judge.plan_of, made, figures, latency)
    plan, uniform = judge.plan_of(winner.counts), judge.plan_of(made[0].counts)
    lines = _lines(graph, search, made, judged)
    front = front_of({c.number: (lines[c.number]["share"], figures[c.number]) for c in made})
    primary, images = context.task.primary, {"judged": len(judge.judged), "repaired": len(judge.repaired)}
    networks = len({c.counts for c in made})
    passes, seen = forward_passes(networks, images["judged"], images["repaired"], judge.micro_batch)
    facts = {
        "solver": "evolution",
        "figure": context.task.titles[primary],
        "cost": search.request.target[0] if search.request.target else "",
        "judged_on": f"{images['judged']:,} {where}",
        "images": images,
        "candidates": len(made),
        "forward_passes": passes,
        "images_seen": seen,
        "seconds": round(sum(judgement.seconds for judgement in judged.values()), 1),
        "winner": lines[winner.number],
        "uniform": lines[0],
        "winners": [lines[c.number] for c in winners.values()],
        "front": [lines[number] for number in front],
        "groups": ratios(graph, uniform, plan),
    }
    served = sorted({*front, winner.number, *(c.number for c in winners.values())})
    fingerprints = {str(number): judge.plan_of(made[number].counts).fingerprint for number in served}
    body = {
        "format": FORMAT,
        "primary": primary,
        "higher_is_better": context.task.higher_is_better,
        "groups": {g.name: g.dense for g in graph.free},
        **{key: facts[key] for key in ("figure", "cost", "judged_on", "images", "forward_passes")},
        "targets": list(search.targets),
        "candidates": lines,
        "front": front,
        "plans": fingerprints,
        "winner": winner.number,
    }
    _say(context, facts)
    return Found(plan, facts, strict_json(body), latency)


def _prepare(
    context: RunContext, graph: DependencyGraph, scores: Mapping[str, Tensor]
) -> tuple[RatioSearch, CandidateJudge, str]:
    """The candidates' rules, what judges them, and the judging images in words."""
    settings, method = context.recipe.select.search, ranking_of(context)
    assert settings is not None
    request = replace(context.round_selection(graph), scope="local")
    assert request.target is not None
    importance = method.importance(scores, graph)
    orders = method.orders(scores, graph, request)

    def plan_of(counts: Counts) -> Plan:
        kept = {g.name: sorted(orders[g.name][g.width - n :]) for g, n in zip(graph.free, counts, strict=True)}
        return Plan.from_kept(graph, kept)

    search = ratio_search(graph, importance, request, settings.targets, settings.candidates, method.options.normalise)
    loader, judged, repaired, where = judging_images(context, settings, scores)
    model = starting_network(context).to(context.environment.device).eval()
    folder = context.path(round_path(context.round, PARTIAL))
    judge = CandidateJudge(
        model, graph, plan_of, loader, judged, repaired, settings.micro_batch, context.environment.comm,
        context.tracker, context.task, folder / "judged.jsonl", context.stage_fingerprint,
    )  # fmt: skip
    return search, judge, where


def judging_images(
    context: RunContext, settings: Search, scores: Mapping[str, Tensor]
) -> tuple[ImageLoader, np.ndarray, np.ndarray, str]:
    """The images of a search: none is a test image, and none both judges and repairs.

    Args:
        context: The run.
        settings: ``select.search``.
        scores: The method's scores, with the images they were made on; those judge only if no others are left.

    Returns:
        The loader of the training images; the ids of the judging images and of those of the repair, ascending; the
        former in words.

    Raises:
        PruneError: None of them can be read.
    """
    loader, (held, learning) = context.images.loader(True), context.images.holdout()
    labels, seed = loader.source.labels, context.recipe.seed
    scored = scores.get("calibration_ids") if context.method.calibration_split != "test" else None
    pool = np.setdiff1d(held, scored.numpy()) if scored is not None else held
    pool = pool if len(pool) else held
    judged = pool[calibration_ids(labels[pool], settings.images, seed, context.recipe.score.balance)]
    if len(judged) < settings.images:
        context.tracker.info(
            f"  select.search.images asks for {settings.images:,} images; {len(judged):,} are held out "
            f"(train.holdout={context.recipe.train.holdout:g}) and not scored on, all are used"
        )
    others = np.setdiff1d(np.arange(len(loader)), held)
    repaired = others[calibration_ids(labels[others], settings.repair_images, seed, context.recipe.score.balance)]
    repaired = repaired if settings.repair == "norms" else repaired[:0]
    loader = replace(loader, transform=replace(context.images.transform, schedule=()))
    loader, readable = context.images.readable(loader, np.union1d(judged, repaired))
    judged, repaired = np.intersect1d(judged, readable), np.intersect1d(repaired, readable)
    if not len(judged):
        raise PruneError("select.search: none of the held-out images can be read")
    where = "training images that train.holdout holds out"
    if context.networks.checkpoint is not None:
        where += "; backbone.checkpoint may have been trained on them"
    elif "train" in learning:
        where += "; the dense network was trained on them (train.selection is not holdout)"
    return loader, judged, repaired, where


def _lines(
    graph: DependencyGraph, search: RatioSearch, made: Sequence[Candidate], judged: Mapping[int, Judgement]
) -> list[dict[str, Any]]:
    """A line for each candidate: what it is, what it costs, what it is worth."""
    costs = searched_costs(search.request.cost)
    return [
        {
            "number": c.number,
            "origin": c.origin,
            "target": c.target,
            "share": search.share(c.counts),
            **{cost.name: cost.share(graph, search.kept(c.counts)) for cost in costs},
            "figure": judged[c.number].figure,
            "seconds": judged[c.number].seconds,
            "counts": list(c.counts),
        }
        for c in made
    ]


def _say(context: RunContext, facts: Mapping[str, Any]) -> None:
    task, winner = context.task, facts["winner"]
    context.tracker.info(
        f"  search: candidate {winner['number']} ({winner['origin']}) of {facts['candidates']}: "
        f"{task.text(winner['figure'])}, uniform {task.text(facts['uniform']['figure'])}, on {facts['judged_on']}"
    )
    if "memory" in winner:
        context.tracker.info(f"  search: {winner['memory']:.1%} of the peak of activations is left")


def _timed(context: RunContext, graph: DependencyGraph, scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """The times of the groups, and the uniform network that meets the latency target; kept for a resumed search."""
    file = context.path(round_path(context.round, PARTIAL)) / "timed.json"
    comm = context.environment.comm

    def saved() -> dict[str, Any] | None:
        body = read_json(file)
        return body.get("timed") if body.get("of") == context.stage_fingerprint else None

    timed = comm.broadcast_object(comm.run_on_main(saved))
    if timed is None:
        timed = latency_target.search_latency(context, graph, lambda timed: uniform_plan(context, timed, scores))[1]

        def save() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps({"of": context.stage_fingerprint, "timed": timed}))

        comm.run_on_main(save)
    return timed


def _measured_winner(
    context: RunContext,
    graph: DependencyGraph,
    search: RatioSearch,
    plan_of: Callable[[Counts], Plan],
    made: Sequence[Candidate],
    figures: Mapping[int, float],
    latency: dict[str, Any],
) -> tuple[Candidate, dict[str, Any]]:
    """The best candidate whose measured time is within the target's tolerance; the uniform one, which was measured."""
    target, tolerance = search.targets[0], context.recipe.target.latency_tolerance
    ranked = [c for c in best_of(made, figures) if c.target == target]
    better = [c for c in ranked if figures[c.number] > figures[0]][:TIMED_AT_MOST]
    tried = list(latency["tried"])
    for start in range(0, len(better), TIMED):
        few = better[start : start + TIMED]
        times = latency_target.network_times(context, graph).of_plans({str(c.number): plan_of(c.counts) for c in few})
        for candidate in few:
            measured, reliable = times[str(candidate.number)]
            tried.append([search.share(candidate.counts), measured])
            within = measured <= target * (1 + (tolerance or 0.0))
            near = tolerance is None or measured >= target * (1 - tolerance)
            context.tracker.info(
                f"  search: candidate {candidate.number} takes {measured:.1%} of the dense time"
                + ("" if reliable else " (not reliable)")
            )
            if within and near and reliable:
                found = {"predicted": search.share(candidate.counts), "measured": measured, "reliable": reliable}
                return candidate, {**latency, **found, "tried": tried}
    return made[0], {**latency, "tried": tried}


def take_from(
    context: RunContext, graph: DependencyGraph, scores: Mapping[str, Tensor], front: Mapping[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """The network of another run's front that ``select.from`` takes.

    Args:
        context: The run.
        graph: Dependency graph of the dense network.
        scores: This run's scores, which have to be those that the front's networks were cut by.
        front: search.json of the other run.

    Returns:
        The plan, and facts for the report.

    Raises:
        PruneError: No network of the front is within the target and its tolerance, or it was cut by other scores.
    """
    line = best_on_front(context.recipe, graph, front)
    orders = ranking_of(context).orders(scores, graph, context.selection)
    kept = {g.name: sorted(orders[g.name][g.width - n :]) for g, n in zip(graph.free, line["counts"], strict=True)}
    plan = Plan.from_kept(graph, kept)
    if plan.fingerprint != front["plans"].get(str(line["number"])):
        raise PruneError(
            f"select.from: the networks of {context.recipe.select.from_} were cut by other scores than this run's. Set "
            f"score.from={context.recipe.select.from_}, with its backbone, data, seed and method, or search here"
        )
    uniform = uniform_plan(context, graph, scores)
    lines = {one["number"]: one for one in front["candidates"]}
    return plan, {
        "solver": "evolution",
        "from": str(context.recipe.select.from_),
        **{key: front[key] for key in ("figure", "cost", "judged_on", "images", "forward_passes")},
        "candidates": len(front["candidates"]),
        "winner": line,
        "front": [lines[number] for number in front["front"]],
        "groups": ratios(graph, uniform, plan),
    }
