"""Tiny networks on real images: what most tests work with."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune import methods, models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.random_access import ImageSource
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.export import bundle
from dist_prune.pruning.graph.groups import Units
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import count_images, num_correct
from dist_prune.training.tracking import Tracker

IMAGES = 53  # not a multiple of the micro-batch, nor of 2 or 3
MICRO = 7


def network(seed: int = 0, name: str = "resnet8p_cifar", in_chans: int = 1, **kwargs: Any) -> nn.Module:
    """A residual network for 8x8 digits in float64 (rounding cannot turn a hash bit), batch norms set to something."""
    torch.manual_seed(seed)
    model = models.create(name, 10, in_chans, kwargs={"img_size": 8, **kwargs}).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def machine(ranks: Communicator | None = None) -> DistributedEnvironment:
    return DistributedEnvironment(torch.device("cpu"), ranks or Communicator())


def digits_feed(dtype: torch.dtype = torch.float64) -> ImageLoader:
    return feed_of(open_source("digits", None, "", True), dtype)


def feed_of(source: ImageSource, dtype: torch.dtype = torch.float64, workers: int = 0) -> ImageLoader:
    look = TransformConfig(8, (0.3,) * source.in_chans, (0.4,) * source.in_chans)
    return ImageLoader(source, look, torch.device("cpu"), workers, dtype)


def example(in_chans: int = 1, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, in_chans, size, size), generator=generator, dtype=torch.float64)


def bench(
    model: nn.Module,
    ranks: Communicator | None = None,
    feed: ImageLoader | None = None,
    images: int = IMAGES,
    seed: int = 0,
    partial: Path | None = None,
    micro_batch: int = MICRO,
    save_every: int = 1,
    units: Units = "earlier",
) -> DistributedScoringContext:
    feed = feed or digits_feed()
    channels = trace_groups(model, example(feed.source.in_chans)[:1], units=units)
    return DistributedScoringContext(
        model, channels, feed, np.arange(images), machine(ranks), Tracker(False), micro_batch, seed, partial, "test",
        save_every,
    )  # fmt: skip


def correct(
    digits: DistributedScoringContext, removed: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> tuple[int, int]:
    """(right, all) of the bench's calibration images with the channels ``removed[group]`` gated off."""
    with gate_off(digits.model, digits.graph, removed):
        (right,), images = count_images(
            lambda part: num_correct(digits.model(part.images), part.labels)[None], 1, digits.loader, digits.ids,
            digits.micro_batch, digits.environment.comm, digits.tracker, "count",
        )  # fmt: skip
    return right, images


LIGHT = {"shapley": {"samples": 3}}  # as little as the laws need


def method(name: str):
    """A method with its default options (less of them where that takes long)."""
    kind = methods.find(name)
    return kind(kind.Options(**LIGHT.get(name, {})))


def cut(model: nn.Module, channels, plan) -> nn.Module:
    """A pruned copy."""
    small = copy.deepcopy(model)
    surgeon.apply_plan(small, channels, plan)
    return small


IMAGE = {"size": 8, "mean": [0.3], "std": [0.4], "crop": 1.0, "interpolation": "bilinear", "crop_mode": "center"}


def bundled(folder: Path, digits: DistributedScoringContext | None = None) -> Path:
    """A bundle of a pruned network for digits in ``folder``."""
    digits = digits or bench(network())
    ranking = method("l1")
    plan = ranking.select(ranking.score(digits), digits.graph, SelectionRequest(target=("macs", 0.6)))
    weights = cut(digits.model, digits.graph, plan).float().state_dict()
    spec = {"name": "resnet8p_cifar", "kwargs": {"img_size": 8}, "num_classes": 10, "in_chans": 1}
    figures = {"dense": {"top1": 90.0, "macs": 100, "params": 9}, "finetuned": {"top1": None, "macs": 60, "params": 5}}
    origin = {"recipe": "r", "method": "l1", "paper": "P", "seed": 0, "data": "digits", "finetune_epochs": 0}
    folder.mkdir(parents=True)
    text = bundle.manifest_json(spec, plan, IMAGE, tuple("0123456789"), weights, figures, origin)
    (folder / bundle.MANIFEST).write_text(text)
    tensor_files.save_tensors(folder / bundle.WEIGHTS, weights)
    return folder
