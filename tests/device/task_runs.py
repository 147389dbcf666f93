"""Tasks beside classification on the pretend device: scored, cut, trained and judged, in plain values."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_prune import tasks
from dist_prune.config.training import Training
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.random_access import ImageSource
from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer
from tests.device import runs, traffic
from tests.support import boxes, masks, tiny

QUIET = Tracker(False)


def _bed(name: str, root: Path) -> tuple[nn.Module, ImageSource, int]:
    """Network, images and their side."""
    if name == "segmentation":
        return masks.network().float(), masks.source(root), masks.SIDE
    return boxes.network(), boxes.source(root), boxes.SIDE


def write(name: str, root: Path) -> None:
    (masks.write if name == "segmentation" else boxes.write)(root, count=8, splits=("train",))


def _loader(source: ImageSource, side: int, device: torch.device) -> ImageLoader:
    return ImageLoader(source, TransformConfig(side, (0.3,) * 3, (0.4,) * 3, crop_mode="squash"), device)


def waits(ranks: Communicator, name: str, root: Path) -> dict[str, traffic.Each]:
    """Of a training step and of an evaluation batch of a task."""
    at, task = runs.machine(ranks, "pretend"), tasks.build({"name": name})
    model, source, side = _bed(name, root)
    feed = _loader(source, side, at.device)
    model.to(at.device)

    def train(batches: int) -> None:
        settings = Training(epochs=1, batch=2, lr=0.01, selection="last", images=2 * batches)
        Trainer(_bed(name, root)[0], Loop(settings, feed, at, QUIET, 0), lambda network: {}, task=task).run()

    def judge(batches: int) -> None:
        evaluate(model, feed, 1, at.comm, QUIET, ids=np.arange(batches), task=task)

    return {"training": traffic.slope("pretend", train), "evaluation": traffic.slope("pretend", judge)}


def whole(ranks: Communicator, kind: str, name: str, root: Path) -> dict[str, Any]:
    """Scored by taylor, cut, one epoch in channels_last, judged before and after it."""
    at, task = runs.machine(ranks, kind), tasks.build({"name": name})
    model, source, side = _bed(name, root)
    feed = _loader(source, side, at.device)
    groups = trace_groups(model, torch.randn(1, 3, side, side))
    graph = groups.protect_producers(task.protect(groups.producers))
    method = tiny.method("taylor")
    bench = DistributedScoringContext(model.to(at.device), graph, feed, np.arange(7), at, QUIET, 3, task=task)
    plan = method.select(method.score(bench), graph, SelectionRequest(target=("macs", 0.6)))
    small = _bed(name, root)[0].to(at.device)
    surgeon.apply_plan(small, graph, plan)
    pruned = evaluate(small, feed, 3, at.comm, QUIET, task=task)
    settings = Training(epochs=1, batch=3, lr=0.01, selection="last", channels_last=True)
    history = Trainer(small, Loop(settings, feed, at, QUIET, 0), lambda network: {}, task=task).run()
    tuned = evaluate(small, feed, 3, at.comm, QUIET, task=task)
    return {"plan": plan.fingerprint, "pruned": pruned, "history": runs.plain(history), "tuned": tuned}
