"""Networks of timm and of this package by name, and the preparation of their images."""

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
    torchvision_networks,
    unet,
    vgg_cifar,
    vgg_fc,
    wide_resnet_cifar,
)
from dist_prune.models.meta_shapes import meta_shapes
from dist_prune.models.torchvision_networks import is_torchvision

LARGE = 500_000_000  # largest number of values of a network with arguments, or four times that without them
__all__ = ["check", "create", "image_config", "is_torchvision", "list_names", "pretrained_classes", "state_shapes"]
_OWN = (  # registered by their import
    densenet_cifar, googlenet_cifar, lenet, lenet_tanh, mlp, mobilenet_cifar, resnet_cifar, unet,
    vgg_cifar, vgg_fc, wide_resnet_cifar,
)  # fmt: skip


def list_names(pattern: str = "") -> list[str]:
    """The names of all backbones, those of timm and of this package.

    Args:
        pattern: glob of names; "" for all.
    """
    return timm.list_models(pattern or "*")


def create(
    name: str, classes: int, in_chans: int, pretrained: bool = False, kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network.

    Args:
        name: of the backbone, for timm.
        classes: number of outputs.
        in_chans: channels of the images.
        pretrained: whether timm fetches its pretrained weights.
        kwargs: arguments of the network's class (see model_kwargs.py); files, URLs and configs are refused before
            anything is built.

    Returns:
        The network on the CPU, in training mode.

    Raises:
        PruneError: unknown name (with the nearest one), arguments that the network refuses, or weights that cannot be
            fetched.
    """
    check(name, kwargs or {})
    if kwargs:  # without arguments the sizes are known to be sensible
        state_shapes(name, classes, in_chans, kwargs)
    return _build(name, classes, in_chans, pretrained, kwargs or {})


def check(name: str, kwargs: Mapping[str, Any]) -> None:
    """Check name and arguments of a network without building it.

    Args:
        name: of the backbone, for timm.
        kwargs: arguments of the network's class.

    Raises:
        PruneError: unknown name, or arguments that are not those of its class.
    """
    if is_torchvision(name):
        torchvision_networks.check(name)
    elif not isinstance(name, str) or not timm.is_model(name):
        known = timm.list_models("*")
        raise PruneError(
            f"backbone.name: unknown backbone {shown(name)}.{nearest(str(name), known)} "
            f"'dist-prune list backbones' shows all {len(known)}."
        )
    model_kwargs.check(name, kwargs)


def state_shapes(
    name: str, classes: int, in_chans: int, kwargs: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]] | None:
    """Compute the shapes of a network's parameters and buffers without allocating them.

    Args:
        name: of the backbone, for timm.
        classes: number of outputs.
        in_chans: channels of the images.
        kwargs: arguments of the network's class.

    Returns:
        Name -> shape; None if the network's constructor needs values of tensors.

    Raises:
        PruneError: as ``create``, or the network is absurdly large.
    """
    check(name, kwargs or {})
    shapes = meta_shapes(lambda: _build(name, classes, in_chans, False, kwargs or {}))
    if kwargs and shapes is not None and (values := sum(map(math.prod, shapes.values()))) > LARGE:
        plain = meta_shapes(lambda: _build(name, classes, in_chans, False, {})) or {}
        if values > 4 * sum(map(math.prod, plain.values())):
            raise PruneError(f"backbone.kwargs: {shown(dict(kwargs))} would make {name} a network of {values:,} values")
    return shapes


def _build(name: str, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        if is_torchvision(name):
            return torchvision_networks.build(name, classes, in_chans, pretrained, kwargs)
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=in_chans, **dict(kwargs))
    except (PruneError, NotImplementedError):
        raise
    except Exception as error:  # constructors raise errors of any class for values that they do not expect
        if "meta" in str(error).lower():
            raise
        reason = shown(str(error))[1:-1]
        if pretrained and isinstance(error, OSError):
            raise PruneError(
                f"backbone.pretrained: timm could not fetch the weights of {name!r}: {reason} Run the command once "
                "where there is a network (timm keeps them in $HF_HOME), or name a file: backbone.checkpoint=FILE"
            ) from error
        raise PruneError(f"backbone {name!r} could not be built with {shown(dict(kwargs))}: {reason}") from error


def pretrained_classes(name: str) -> int | None:
    """The number of classes of timm's pretrained weights; None if a network has no such weights."""
    if is_torchvision(name):
        return None
    config = timm.get_pretrained_cfg(name)
    return config.num_classes if config is not None and config.has_weights else None


def image_config(model: nn.Module, in_chans: int) -> dict[str, Any]:
    """The preparation of images that timm's config of a network has.

    Args:
        model: built by ``create``.
        in_chans: channels of the images; if they differ from the config's, ``mean`` and ``std`` are averaged.

    Returns:
        ``mean`` and ``std`` (per channel, for values from 0 to 1), ``input_size`` (C, H, W), ``interpolation``,
        ``crop_pct``.
    """
    config = resolve_data_config({}, model=model)
    config["input_size"] = (in_chans, *config["input_size"][1:])
    if len(config["mean"]) != in_chans:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    return config
