"""Checks before a run starts. All problems of a recipe, this machine and these images are reported at once."""

from collections.abc import Callable
from typing import Any

import torch

from dist_prune.config.training import Training
from dist_prune.data import sampling
from dist_prune.data.datasets import OPENERS
from dist_prune.errors import PruneError
from dist_prune.pipeline import criteria, recipe_checks, search_checks
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.networks import check_teacher
from dist_prune.pipeline.stage_graph import judges
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.cost import target_keys
from dist_prune.training import acceleration, latency, optim


def precheck(context: RunContext) -> None:
    """Check the recipe against this machine and these images before any work. All ranks call it.

    Args:
        context: The run.

    Raises:
        PruneError: A line for each problem.
    """
    recipe, environment = context.recipe, context.environment
    problems: list[str] = []

    def attempt(check: Callable[..., Any], *arguments: Any) -> bool:
        try:
            check(*arguments)
        except PruneError as error:
            problems.append(str(error))
            return False
        return True

    done = [name for name in ("train", "score") if context.ledger.last(name) is not None]
    problems += recipe_checks.missing_files(recipe, done)
    trainings = list(recipe_checks.training_sections(recipe))
    attempt(recipe_checks.check_rounds, recipe, context.method, environment.zero_stage)
    attempt(check_teacher, recipe)
    attempt(recipe_checks.check_repair, recipe)
    attempt(search_checks.check_search, recipe, context.method)
    if not attempt(lambda: context.task):
        raise PruneError("\n".join(problems))
    problems += recipe_checks.task_problems(recipe, context.method, context.task)
    attempt(_many, context)
    for settings, name in trainings:
        attempt(acceleration.check, settings, environment, name, recipe.cluster.deterministic)
    # one rank scans the folders, the others take its index
    if (
        attempt(environment.comm.run_on_main, lambda: context.images.splits)
        and attempt(_same_images, context)
        and attempt(_network, context)
    ):
        attempt(criteria.check_criteria, context)
        attempt(_timing, context)
        for training in trainings:
            attempt(_training, context, *training)
    if problems:
        raise PruneError("\n".join(problems))
    context.images.stage_files()


def _same_images(context: RunContext) -> None:
    """PruneError if a Dataset, whose code every rank runs, gives other images on another rank."""
    if context.recipe.data.source in OPENERS:
        return
    by_split = {train: split.source.identity for train, split in context.images.splits.items()}
    if len({str(identities) for identities in context.environment.comm.all_gather_object(by_split)}) > 1:
        raise PruneError(
            f"data.source: {context.recipe.data.source} gives other images, or another order, on some ranks. Every "
            "rank calls it alike: sort what it lists, draw nothing at random, and give all machines the same files"
        )


def _timing(context: RunContext) -> None:
    """PruneError if the report's times cannot be measured: too many threads, or batches that exceed the memory."""
    spec = context.recipe.report
    sizes = [*spec.latency_batches, *([context.recipe.target.latency_batch] if context.recipe.target.latency else [])]
    shape = (context.images.in_channels, *context.images.transform.sides)
    latency.check(context.networks.create(), shape, sizes, spec.threads, context.environment.device)


def _many(context: RunContext) -> None:
    """PruneError if ``score.compare`` is combined with a target that has to be measured for each criterion."""
    cost = context.selection.cost
    if context.recipe.score.compare and cost is not None and cost.measured:
        raise PruneError(
            f"score.compare: criteria are compared at the same {target_keys()}; a "
            f"target.{cost.name} is searched for by measuring networks of one criterion. Set one of the others"
        )


def _search(context: RunContext, graph: DependencyGraph) -> None:
    """PruneError if a target of a search cannot be reached, its images are missing, or ``select.from`` has no such."""
    recipe = context.recipe
    search_checks.check_targets(recipe, graph)
    if recipe.select.from_:
        search_checks.best_on_front(recipe, graph, search_checks.read_front(recipe))
    if judges(recipe) and not len(context.images.holdout()[0]):
        raise PruneError(
            f"select.search.judge: heldout judges by training images that are held out, and train.holdout="
            f"{recipe.train.holdout:g} of the {recipe.train.images or len(context.images.loader(True))} training "
            "images is none. Raise train.images or train.holdout"
        )


def _network(context: RunContext) -> None:
    """PruneError if there is no such network, or the method cannot do with it what the recipe asks for."""
    recipe_checks.check_targets(context.task, context.images.splits[True].source, context.recipe.data.source)
    _sizes(context)
    recipe_checks.check_outputs(
        context.task,
        context.networks.create(),
        context.images.example_input,
        len(context.images.classes),
        context.recipe.backbone.name,
    )
    if context.recipe.select.plan:
        context.networks.replayed_plan(context.selection)
    else:
        graph = context.selection_graph()
        _search(context, graph)
        fresh = context.method.layers_to_reinit(graph)
        if fresh and context.recipe.repairs:
            raise PruneError(
                f"repair.method: the released code gives {', '.join(fresh)} new weights after cutting; there is "
                f"nothing to repair. Leave that quirk out, or set {context.recipe.repair_off}"
            )
        if fresh and context.recipe.schedule.rounds > 1:
            raise PruneError(
                f"schedule.rounds: the released code gives {', '.join(fresh)} new weights after cutting; in rounds it "
                "would forget what it learned between them. Leave that quirk out, or set it to 1"
            )


def _training(context: RunContext, settings: Training, name: str) -> None:
    """PruneError if a training's batches are too small or its optimizer is invalid (surgery renames no parameter)."""
    learned, _ = context.images.training_split(settings)
    sampling.check_batch_size(settings.batch, len(learned), context.environment.comm.world, name)
    optim.check(context.networks.create(), settings, name)


def _sizes(context: RunContext) -> None:
    """PruneError if the network cannot take the image sizes of the recipe's schedule."""
    context.images.loader(True)  # refuses what the backend cannot do
    for size in sorted(set(context.recipe.data.resize_schedule.values())):
        try:
            with torch.no_grad():
                context.networks.create().eval()(torch.zeros(1, context.images.in_channels, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            name = context.recipe.backbone.name
            raise PruneError(f"data.resize_schedule: {name} cannot take images of side {size}: {error}") from error
