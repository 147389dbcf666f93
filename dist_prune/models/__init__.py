"""The only door to timm: networks by name, and how their images are prepared."""

import math
from collections.abc import Mapping
from typing import Any

import timm
from timm.data.config import resolve_data_config
from torch import nn

from dist_prune.errors import PruneError, nearest, shown
from dist_prune.models import (
    densenet_cifar,
    googlenet_cifar,
    lenet,
    lenet_tanh,
    mlp,
    mobilenet_cifar,
    model_kwargs,
    resnet_cifar,
    vgg_cifar,
    vgg_fc,
    wide_resnet_cifar,
)
from dist_prune.models.meta_shapes import meta_shapes

LARGE = 500_000_000  # values that arguments may make of a network, or four times what it has without them
__all__ = ["check", "create", "image_config", "list_names", "pretrained_classes", "state_shapes"]
_OWN = (  # importing them registers them
    densenet_cifar, googlenet_cifar, lenet, lenet_tanh, mlp, mobilenet_cifar, resnet_cifar, vgg_cifar,
    vgg_fc, wide_resnet_cifar,
)  # fmt: skip


def list_names(pattern: str = "") -> list[str]:
    """The backbones that timm (with this package's own) can build, filtered by a glob."""
    return timm.list_models(pattern or "*")


def create(
    name: str, classes: int, in_chans: int, pretrained: bool = False, kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """A fresh network.

    Raises:
        PruneError: unknown name (with the nearest one), or arguments that the network refuses; what names files, URLs
            or configs is refused before anything is built (see ``arguments``).
    """
    check(name, kwargs or {})
    if kwargs:  # timm's own networks have sizes that somebody trained
        state_shapes(name, classes, in_chans, kwargs)
    return _built(name, classes, in_chans, pretrained, kwargs or {})


def check(name: str, kwargs: Mapping[str, Any]) -> None:
    """PruneError for an unknown network, or arguments that are not those of its class. Builds nothing."""
    if not isinstance(name, str) or not timm.is_model(name):
        known = timm.list_models("*")
        raise PruneError(
            f"backbone.name: unknown backbone {shown(name)}.{nearest(str(name), known)} "
            f"'dist-prune list backbones' shows all {len(known)}."
        )
    model_kwargs.check(name, kwargs)


def state_shapes(
    name: str, classes: int, in_chans: int, kwargs: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]] | None:
    """Name -> shape of the tensors of a network, nothing allocated; None where this version of timm cannot say.

    Raises:
        PruneError: as ``create``; the network is absurdly large.
    """
    check(name, kwargs or {})
    found = meta_shapes(lambda: _built(name, classes, in_chans, False, kwargs or {}))
    if kwargs and found is not None and (values := sum(map(math.prod, found.values()))) > LARGE:
        plain = meta_shapes(lambda: _built(name, classes, in_chans, False, {})) or {}
        if values > 4 * sum(map(math.prod, plain.values())):
            raise PruneError(f"backbone.kwargs: {shown(dict(kwargs))} would make {name} a network of {values:,} values")
    return found


def _built(name: str, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=in_chans, **dict(kwargs))
    except (PruneError, NotImplementedError):
        raise
    except Exception as error:  # whatever a constructor makes of values that it was not written for
        if "meta" in str(error).lower():
            raise
        said = shown(str(error))[1:-1]
        if pretrained and isinstance(error, OSError):
            raise PruneError(
                f"backbone.pretrained: timm could not fetch the weights of {name!r}: {said} Run the command once "
                "where there is a network (timm keeps them in $HF_HOME), or name a file: backbone.checkpoint=FILE"
            ) from error
        raise PruneError(f"backbone {name!r} could not be built with {shown(dict(kwargs))}: {said}") from error


def pretrained_classes(name: str) -> int | None:
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
