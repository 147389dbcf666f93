"""Tiny networks on real images: what most tests work with."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune import bundle, methods
from dist_prune.bench import Bench
from dist_prune.pruning import surgeon
from dist_prune.pruning.choose import Request
from dist_prune.pruning.gating import gate_off
from dist_prune.pruning.trial import sites_of
from dist_prune.runtime import backbones, checkpoint
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.data.feed import Feed, Look
from dist_prune.runtime.data.random_access import ImageSource
from dist_prune.runtime.data.sources import open_source
from dist_prune.runtime.evaluation import count_images, num_correct
from dist_prune.runtime.machine import Machine
from dist_prune.runtime.tracking import Tracker

IMAGES = 53  # not a multiple of the micro-batch, nor of 2 or 3
MICRO = 7


def network(seed: int = 0, name: str = "resnet8p_cifar", in_chans: int = 1, **kwargs: Any) -> nn.Module:
    """A residual network for 8x8 digits in float64 (rounding cannot turn a hash bit), batch norms set to something."""
    torch.manual_seed(seed)
    model = backbones.create(name, 10, in_chans, kwargs={"img_size": 8, **kwargs}).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def machine(ranks: Ranks | None = None) -> Machine:
    return Machine(torch.device("cpu"), ranks or Ranks())


def digits_feed(dtype: torch.dtype = torch.float64) -> Feed:
    return feed_of(open_source("digits", None, "", True), dtype)


def feed_of(source: ImageSource, dtype: torch.dtype = torch.float64, workers: int = 0) -> Feed:
    look = Look(8, (0.3,) * source.in_chans, (0.4,) * source.in_chans)
    return Feed(source, look, torch.device("cpu"), workers, dtype)


def example(in_chans: int = 1, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, in_chans, size, size), generator=generator, dtype=torch.float64)


def bench(
    model: nn.Module, ranks: Ranks | None = None, feed: Feed | None = None, images: int = IMAGES, seed: int = 0,
    partial: Path | None = None, micro_batch: int = MICRO, save_every: int = 1,
) -> Bench:  # fmt: skip
    feed = feed or digits_feed()
    channels = sites_of(model, example(feed.source.in_chans)[:1])
    return Bench(
        model, channels, feed, np.arange(images), machine(ranks), Tracker(False), micro_batch, seed, partial, "test",
        save_every,
    )  # fmt: skip


def correct(digits: Bench, removed: Mapping[str, Sequence[int]] = MappingProxyType({})) -> tuple[int, int]:
    """(right, all) of the bench's calibration images with the channels ``removed[group]`` gated off."""
    with gate_off(digits.model, digits.channels, removed):
        (right,), images = count_images(
            lambda part: num_correct(digits.model(part.images), part.labels)[None], 1, digits.feed, digits.ids,
            digits.micro_batch, digits.machine.ranks, digits.tracker, "count",
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
    surgeon.operate(small, channels, plan)
    return small


IMAGE = {"size": 8, "mean": [0.3], "std": [0.4], "crop": 1.0, "interpolation": "bilinear", "crop_mode": "center"}


def bundled(folder: Path, digits: Bench | None = None) -> Path:
    """A bundle of a pruned network for digits in ``folder``."""
    digits = digits or bench(network())
    ranking = method("l1")
    plan = ranking.select(ranking.score(digits), digits.channels, Request(target=("macs", 0.6)))
    weights = cut(digits.model, digits.channels, plan).float().state_dict()
    spec = {"name": "resnet8p_cifar", "kwargs": {"img_size": 8}, "num_classes": 10, "in_chans": 1}
    figures = {"dense": {"top1": 90.0, "macs": 100, "params": 9}, "finetuned": {"top1": None, "macs": 60, "params": 5}}
    origin = {"recipe": "r", "method": "l1", "paper": "P", "seed": 0, "data": "digits", "finetune_epochs": 0}
    folder.mkdir(parents=True)
    text = bundle.manifest(spec, plan, IMAGE, tuple("0123456789"), weights, figures, origin)
    (folder / bundle.MANIFEST).write_text(text)
    checkpoint.save(folder / bundle.WEIGHTS, weights)
    return folder
