"""The only door to timm: networks by name, and how their images are prepared."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.data.config import resolve_data_config
from torch import nn

from dist_prune.errors import PruneError, nearest
from dist_prune.runtime.backbones import (
    densenet_cifar,
    googlenet_cifar,
    lenet,
    lenet_entropy,
    mlp,
    mobilenet_cifar,
    resnet_cifar,
    vgg_cifar,
    wide_resnet_cifar,
)

__all__ = ["create", "image_config", "names"]
_OWN = (  # importing them registers them
    densenet_cifar, googlenet_cifar, lenet, lenet_entropy, mlp, mobilenet_cifar, resnet_cifar, vgg_cifar,
    wide_resnet_cifar,
)  # fmt: skip


def names(pattern: str = "") -> list[str]:
    """The backbones that timm (with this package's own) can build, filtered by a glob."""
    return timm.list_models(pattern or "*")


def create(
    name: str, classes: int, in_chans: int, pretrained: bool = False, kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """A fresh network.

    Raises:
        PruneError: unknown name (with the nearest one), or arguments that the network refuses.
    """
    if not timm.is_model(name):
        known = timm.list_models("*")
        raise PruneError(
            f"backbone.name: unknown backbone {name!r}.{nearest(name, known)} "
            f"'dist-prune list backbones' shows all {len(known)}."
        )
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=classes, in_chans=in_chans, **dict(kwargs or {})
        )
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise PruneError(f"backbone {name!r} could not be built with {dict(kwargs or {})}: {error}") from error


def image_config(model: nn.Module, in_chans: int) -> dict[str, Any]:
    """timm's ``mean``, ``std``, ``input_size`` (C, H, W), ``interpolation`` and ``crop_pct`` for a network."""
    config = resolve_data_config({}, model=model)
    config["input_size"] = (in_chans, *config["input_size"][1:])
    if len(config["mean"]) != in_chans:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    return config
