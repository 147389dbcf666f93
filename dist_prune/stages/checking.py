"""What can be found out before any work is found out before any work: all of it at once."""

from collections.abc import Callable
from typing import Any

import torch

from dist_prune import foreseen
from dist_prune.errors import PruneError
from dist_prune.pruning.cost import target_keys
from dist_prune.pruning.trial import check_logits
from dist_prune.recipe import Training
from dist_prune.runtime import latency
from dist_prune.runtime.data import dealing
from dist_prune.runtime.training import fast, optim
from dist_prune.stages import criteria
from dist_prune.stages.work import Work


def precheck(work: Work) -> None:
    """PruneError with everything that is wrong with a recipe on this machine and these images."""
    recipe, machine = work.recipe, work.machine
    problems: list[str] = []

    def attempt(check: Callable[..., Any], *arguments: Any) -> bool:
        try:
            check(*arguments)
        except PruneError as error:
            problems.append(str(error))
            return False
        return True

    done = [name for name in ("train", "score") if work.ledger.last(name) is not None]
    problems += foreseen.missing(recipe, done)
    trainings = list(foreseen.trainings(recipe))
    attempt(foreseen.rounds, recipe, work.method, machine.zero)
    attempt(_many, work)
    for settings, name in trainings:
        attempt(fast.check, settings, machine, name, recipe.cluster.deterministic)
    # one rank looks through folders, the others take its index
    if attempt(machine.ranks.together, lambda: work.opened) and attempt(_network, work):
        attempt(criteria.check, work)
        attempt(_timing, work)
        for training in trainings:
            attempt(_training, work, *training)
    if problems:
        raise PruneError("\n".join(problems))


def _timing(work: Work) -> None:
    """PruneError where the report's times cannot be measured: too many threads, batches that fit no memory."""
    spec = work.recipe.report
    sizes = [*spec.latency_batches, *([work.recipe.target.latency_batch] if work.recipe.target.latency else [])]
    shape = (work.in_chans, work.look.size, work.look.size)
    latency.check(work.shell(), shape, sizes, spec.threads, work.machine.device)


def _many(work: Work) -> None:
    """PruneError where criteria are to be compared at a target that has to be measured for each of them."""
    cost = work.request.cost
    if work.recipe.score.many and cost is not None and cost.measured:
        raise PruneError(
            f"score.many: criteria are compared at the same {target_keys()}; a "
            f"target.{cost.name} is searched for by measuring networks of one criterion. Set one of the others"
        )


def _network(work: Work) -> None:
    """PruneError where there is no such network, or the method cannot do with it what the recipe asks for."""
    _sizes(work)
    check_logits(work.shell(), work.example, work.recipe.backbone.name)
    if work.recipe.select.plan:
        work.replayed()
    else:
        channels = work.method.ready(work.channels, work.recipe.select.exclude, work.request)
        fresh = work.method.fresh(channels)
        if fresh and work.recipe.schedule.rounds > 1:
            raise PruneError(
                f"schedule.rounds: the released code gives {', '.join(fresh)} new weights after cutting; in rounds it "
                "would forget what it learned between them. Leave that quirk out, or set it to 1"
            )


def _training(work: Work, settings: Training, name: str) -> None:
    """PruneError where a training's batches are too small, or its optimizer is none (surgery renames nothing)."""
    dealing.check(settings.batch, len(work.dealt(settings)[0]), work.machine.ranks.world, name)
    optim.check(work.shell(), settings, name)


def _sizes(work: Work) -> None:
    """PruneError where the network cannot take the images of the recipe's schedule."""
    work.feed(True)  # refuses what the backend cannot do
    for size in sorted(set(work.recipe.data.resize_schedule.values())):
        try:
            with torch.no_grad():
                work.shell().eval()(torch.zeros(1, work.in_chans, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            name = work.recipe.backbone.name
            raise PruneError(f"data.resize_schedule: {name} cannot take images of side {size}: {error}") from error
