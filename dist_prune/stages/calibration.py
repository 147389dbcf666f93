"""The scoring context of a round, and its repair: networks, and the calibration images that the recipe draws."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.base import TRAINED, Method
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.stage_graph import round_path
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.scoring.repair import Repairer

SCORES, RECORD = "scores.safetensors", "measured.jsonl"  # artifacts of a round


def calibration_pool(context: RunContext, method: Method) -> np.ndarray:
    """The images that the calibration set is drawn from.

    Adds an event if the test images rank channels, or if images that should be held out are trained on.

    Args:
        context: The run.
        method: The method that scores; its ``calibration_split`` decides the images.

    Returns:
        (n,) int64 ids of the split, ascending.
    """
    if method.calibration_split == "test":
        event = "channels are ranked by the test images: the network's figures on them are too good"
        context.tracker.info(f"  warning: {event}")
        context.events.append({"stage": "score", "event": event})
    if method.calibration_split != "held_out":
        return np.arange(len(context.images.loader(method.calibration_split == "train")))
    held, learning = context.images.holdout()
    if learning:
        event = f"the held-out images of scoring are trained on ({' and '.join(learning)}: selection is not holdout)"
        context.events.append({"stage": "score", "event": event})
    return held


def starting_network(context: RunContext) -> nn.Module:
    """The network that surgery starts from.

    It is the dense network or the one that the previous round finetuned, with the weights that the method trained while
    it scored, if it trains weights.
    """
    model = context.networks.load_round_input(context.round)
    if context.method.trains_weights and not context.recipe.select.plan:
        scores = context.read_tensors(round_path(context.round, SCORES))
        model.load_state_dict({n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)})
    return model


def scoring_context(
    context: RunContext, graph: DependencyGraph, partial: Path, other: Method | None = None
) -> DistributedScoringContext:
    """The scoring context of the current round, over the calibration images that the recipe draws.

    Args:
        context: The run.
        graph: Dependency graph of the network that the round scores.
        partial: Folder of the statistics that a stopped process had collected.
        other: A method that decides the calibration images instead of the recipe's. Its single measurements are not
            recorded.

    Raises:
        PruneError: None of the calibration images can be read.
    """
    method = other or context.method
    recipe, labels = context.recipe, context.images.loader(method.calibration_split != "test").source.labels
    model = context.networks.load_round_input(context.round).to(context.environment.device)
    pool = calibration_pool(context, method)
    ids = pool[calibration_ids(labels[pool], recipe.score.images, recipe.seed, recipe.score.balance)]
    if isinstance(recipe.score.images, int) and len(ids) < recipe.score.images:
        context.tracker.info(
            f"  score.images asks for {recipe.score.images} images; there are {len(ids)}, all are used"
        )
    loader, ids = context.images.for_scoring(ids, method)
    if not len(ids):
        raise PruneError(
            f"score.images: none of the calibration images can be read ({next(iter(loader.skipped.values()))})"
        )
    record_key = recipe.score.record
    record = Path(record_key).expanduser() if record_key else context.path(round_path(context.round, RECORD))
    return DistributedScoringContext(
        model,
        graph,
        loader,
        ids,
        context.environment,
        context.tracker,
        recipe.score.micro_batch,
        recipe.seed,
        partial,
        context.stage_fingerprint,
        recipe.score.save_every,
        record=None if other else record,
        lineage=context.measurement_fingerprint,
        augmented=method.augmented,
        task=context.task,
    )


def repairer_of(
    context: RunContext, comm: Communicator, *, apart: np.ndarray | None = None, file: Path | None = None
) -> Repairer:
    """The recipe's repair, on the calibration images that it draws from the training images.

    Args:
        context: The run.
        comm: The ranks that repair together.
        apart: (n,) int64 ids of training images that judge, and do not repair.
        file: Where progress is saved, or None.

    Raises:
        PruneError: None of the images can be read.
    """
    recipe = context.recipe
    settings, loader = recipe.repair, context.images.loader(True)
    pool = np.setdiff1d(np.arange(len(loader)), np.zeros(0, dtype=np.int64) if apart is None else apart)
    labels = loader.source.labels[pool]
    ids = pool[calibration_ids(labels, settings.images, recipe.seed, recipe.score.balance)]
    loader = replace(loader, transform=replace(context.images.transform, schedule=()))
    loader, ids = context.images.readable(loader, ids)
    if not len(ids):
        raise PruneError("repair.images: none of the images can be read")
    return Repairer(
        loader,
        ids,
        comm,
        context.tracker,
        settings.method,
        None if settings.ridge == "auto" else settings.ridge,
        settings.micro_batch,
        settings.memory_mb * 2**20,
        file,
        context.stage_fingerprint,
        recipe.select.norms,
    )
