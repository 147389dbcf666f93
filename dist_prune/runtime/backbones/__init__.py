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

__all__ = ["classes_fetched", "create", "image_config", "names"]
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
        if pretrained and isinstance(error, OSError):
            raise PruneError(
                f"backbone.pretrained: timm could not fetch the weights of {name!r}: {error} Run the command once "
                "where there is a network (timm keeps them in $HF_HOME), or name a file: backbone.checkpoint=FILE"
            ) from error
        raise PruneError(f"backbone {name!r} could not be built with {dict(kwargs or {})}: {error}") from error


def classes_fetched(name: str) -> int | None:
    """How many classes the head of timm's pretrained weights has; None where a network has no such weights."""
    config = timm.get_pretrained_cfg(name)
    return config.num_classes if config is not None and config.has_weights else None


def image_config(model: nn.Module, in_chans: int) -> dict[str, Any]:
    """timm's ``mean``, ``std``, ``input_size`` (C, H, W), ``interpolation`` and ``crop_pct`` for a network."""
    config = resolve_data_config({}, model=model)
    config["input_size"] = (in_chans, *config["input_size"][1:])
    if len(config["mean"]) != in_chans:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    return config
