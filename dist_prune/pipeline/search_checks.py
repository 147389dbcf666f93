"""Checks of ``select.search`` and ``select.from`` before any work, and the work that a search will be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_prune.config.recipe import Recipe
from dist_prune.config.safe_parsing import read_json
from dist_prune.config.search import Search
from dist_prune.errors import PruneError
from dist_prune.methods.base import Method, is_ranking
from dist_prune.pipeline.ledger import Ledger
from dist_prune.pipeline.stage_graph import SEARCHED
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.cost import COSTS, target_keys
from dist_prune.pruning.selection.ranking import SelectionRequest, check_target
from dist_prune.pruning.selection.ratio_search import forward_passes, with_target

# Keys of ``select`` that say what a search finds, or that make it senseless.
INSTEAD = ("threshold", "keep_ratio", "counts", "index", "plan")
EXACT = 1e-9  # shares that differ by less are equal


def check_search(recipe: Recipe, method: Method) -> None:
    """Check ``select.search`` and ``select.from`` against the rest of the recipe.

    Args:
        recipe: The validated recipe.
        method: Its method.

    Raises:
        PruneError: They contradict other keys, or the method is no ranking.
    """
    select, key = recipe.select, "select.search" if recipe.select.search else "select.from"
    if select.search is None and select.from_ is None:
        return
    if select.search is not None and select.from_ is not None:
        raise PruneError("select.from: it takes the result of a search; leave it or select.search out")
    if not is_ranking(method):
        raise PruneError(
            f"{key}: {recipe.method['name']} chooses channels by a rule of its own and gives no order of importance "
            "inside a group, which a search needs. Name a ranking method (l1, taylor, fisher, bn_scale, chip and "
            "others: 'dist-prune list methods')"
        )
    if set_ := [f"select.{name}" for name in INSTEAD if getattr(select, name) is not None]:
        raise PruneError(f"{key}: the search finds how many channels each group keeps; leave out {', '.join(set_)}")
    if select.scope != "local" and "scope" not in recipe.chosen_selection:
        raise PruneError(
            f"{key}: the search finds the ratios; select.scope={select.scope} is one of its first candidates. Leave it "
            "out"
        )
    target = recipe.target.asked()
    if target is None:
        raise PruneError(f"{key}: a search needs a target: set {target_keys('target.latency')}")
    measured = COSTS[target[0]].measured
    if measured and (select.from_ or (select.search and select.search.targets)):
        raise PruneError(
            f"{'select.from' if select.from_ else 'select.search.targets'}: one search serves one target.{target[0]}, "
            "because a time belongs to the network that was measured; leave it out"
        )
    if recipe.schedule.rounds > 1 and (select.from_ or (select.search and select.search.targets)):
        raise PruneError(
            f"schedule.rounds: each round searches for its own target; leave out "
            f"{'select.from' if select.from_ else 'select.search.targets'}, or set it to 1"
        )


def check_targets(recipe: Recipe, graph: DependencyGraph) -> None:
    """Check that each of ``select.search.targets`` can be reached.

    Args:
        recipe: The validated recipe.
        graph: Dependency graph whose free groups may be pruned.

    Raises:
        PruneError: One cannot.
    """
    for share in recipe.select.search.targets if recipe.select.search else ():
        try:
            check_target(graph, with_target(SelectionRequest.of(recipe), share))
        except PruneError as error:
            raise PruneError(f"select.search.targets: {error}") from error


def work_text(search: Search) -> str:
    """What a search will cost, in a line; its images may be fewer where a data set has not as many."""
    if search.solver == "knapsack":
        return "search: a knapsack, without images and forward passes"
    repaired = search.repair_images if search.repair == "norms" else 0
    passes, images = forward_passes(search.candidates, search.images, repaired, search.micro_batch)
    return (
        f"search: at most {passes:,} forward passes of {search.micro_batch} images, {images:,} images in all, through "
        f"{search.candidates:,} pruned networks"
    )


def read_front(recipe: Recipe) -> dict[str, Any]:
    """Read search.json of the run that ``select.from`` names.

    Raises:
        PruneError: That run has no finished search, or its file was altered.
    """
    other = Path(str(recipe.select.from_)).expanduser()
    line = Ledger(other).complete("select")
    if line is None or SEARCHED not in line["outputs"]:
        raise PruneError(
            f"select.from: {other} has no finished search ({SEARCHED}, unchanged since its line in ledger.jsonl). Name "
            "the run directory of a recipe with select.search"
        )
    return read_json(other / SEARCHED)


def best_on_front(recipe: Recipe, graph: DependencyGraph, front: Mapping[str, Any]) -> dict[str, Any]:
    """Find the best network of a front within the recipe's target and its tolerance.

    Args:
        recipe: The validated recipe; it has ``select.from``.
        graph: Dependency graph whose free groups may be pruned.
        front: search.json of the other run.

    Returns:
        The candidate's line.

    Raises:
        PruneError: The front is of another cost or of other groups, or none of its networks is within the target.
    """
    asked = recipe.target.asked()
    assert asked is not None
    (quantity, share), other = asked, recipe.select.from_
    if front["cost"] != quantity:
        raise PruneError(f"select.from: {other} searched for target.{front['cost']}, this recipe asks for {quantity}")
    if front["groups"] != {group.name: group.dense for group in graph.free}:
        raise PruneError(
            f"select.from: {other} searched the ratios of other groups than this recipe leaves free; search here, or "
            "give select.include, select.exclude and backbone.protect the values of that run"
        )
    lines = [line for line in front["candidates"] if str(line["number"]) in front["plans"]]
    tolerance = getattr(recipe.target, COSTS[quantity].tolerance)
    least = 0.0 if tolerance is None else share * (1 - tolerance)
    within = [line for line in lines if least <= line["share"] <= share + EXACT and line["figure"] is not None]
    if within:
        sign = 1 if front["higher_is_better"] else -1
        return min(within, key=lambda line: (-sign * line["figure"], line["number"]))
    shares = ", ".join(f"{one:.4g}" for one in sorted({line["share"] for line in lines}))
    raise PruneError(
        f"select.from: the front of {other} has no network within target.{quantity} {share:g} and its tolerance; it "
        f"has {shares}. Move the target, set target.{COSTS[quantity].tolerance}=null for the nearest smaller one, or "
        f"search with select.search.targets=[{share:g}]"
    )
