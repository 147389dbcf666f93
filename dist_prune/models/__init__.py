"""Networks by name, and the preparation of their images. ``sources.py`` lists the forms of names."""

import math
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from torch import nn

from dist_prune.errors import PruneError, shown
from dist_prune.models import (
    densenet_cifar,
    googlenet_cifar,
    lenet,
    lenet_tanh,
    mlp,
    mobilenet_cifar,
    plugin_networks,
    resnet_cifar,
    sources,
    unet,
    vgg_cifar,
    vgg_fc,
    wide_resnet_cifar,
)
from dist_prune.models.meta_shapes import meta_shapes
from dist_prune.models.sources import NetworkSource, check_portable, is_code
from dist_prune.models.timm_networks import SavedTimmNetwork, TimmNetwork
from dist_prune.models.user_networks import UserNetwork

_DETECTION = "torchvision.models.detection"  # imported only where a detector is made
LARGE = 500_000_000  # largest number of values of a network with arguments, or four times that without them
__all__ = [
    "check", "check_portable", "create", "image_config", "is_code", "list_names", "portable", "pretrained_classes",
    "source_files", "source_of", "state_shapes", "take_image_format", "tensor_view",
]  # fmt: skip
_OWN = (  # registered by their import
    densenet_cifar, googlenet_cifar, lenet, lenet_tanh, mlp, mobilenet_cifar, resnet_cifar, unet,
    vgg_cifar, vgg_fc, wide_resnet_cifar,
)  # fmt: skip


def list_names(pattern: str = "") -> list[str]:
    """The names of all backbones: timm's, this package's, those of entry points; ``torchvision:*`` lists torchvision's.

    Args:
        pattern: glob of names; "" for all.
    """
    if pattern.startswith(f"{sources.TORCHVISION}:"):
        from dist_prune.models import torchvision_detectors, torchvision_networks, torchvision_segmenters

        families = (torchvision_networks, torchvision_segmenters, torchvision_detectors)
        known = sorted(name for family in families for name in family.list_names())
        names = (f"{sources.TORCHVISION}:{name}" for name in known)
        return [name for name in names if fnmatchcase(name, pattern) or name.startswith(pattern)]
    plugin_networks.list_names()
    if pattern.startswith(f"{sources.FEATURES}:"):
        return [f"{sources.FEATURES}:{name}" for name in timm.list_models(pattern.partition(":")[2] or "*")]
    return timm.list_models(pattern or "*")


def source_of(name: str) -> NetworkSource:
    """What a backbone's name leads to; nothing is built, read or imported yet.

    Args:
        name: of the backbone, see ``sources.py``.
    """
    prefix = sources.prefix_of(name) if isinstance(name, str) else ""
    if prefix in (sources.HUB, sources.LOCAL):
        return SavedTimmNetwork(name)
    if prefix == sources.TORCHVISION:
        from dist_prune.models import torchvision_detectors, torchvision_segmenters
        from dist_prune.models.torchvision_networks import TorchvisionNetwork

        plain = name.partition(":")[2]
        if plain.partition(".")[0] in torchvision_segmenters.list_names():
            return torchvision_segmenters.TorchvisionSegmenter(plain)
        if torchvision_detectors.is_detector(plain.partition(".")[0]):
            return torchvision_detectors.TorchvisionDetector(plain)
        return TorchvisionNetwork(plain)
    if prefix == sources.FEATURES:
        from dist_prune.models.towers import TowerNetwork

        return TowerNetwork(name.partition(":")[2])
    if prefix == sources.TRANSFORMERS:
        from dist_prune.models.transformers_networks import TransformersNetwork

        return TransformersNetwork(name.partition(":")[2])
    return UserNetwork(name) if prefix == "code" else TimmNetwork(name)


def portable(name: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments under which another machine builds the same dense network.

    Args:
        name: of the backbone.
        kwargs: arguments of the network's class.
    """
    return source_of(name).portable(kwargs)


def source_files(name: str) -> list[Path]:
    """Files on this machine that decide a backbone's network or its weights."""
    return source_of(name).files()


def create(
    name: str, classes: int, in_chans: int, pretrained: bool = False, kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network.

    Args:
        name: of the backbone, see ``sources.py``.
        classes: number of outputs.
        in_chans: channels of the images.
        pretrained: whether it gets its published weights.
        kwargs: arguments of the network's class (see model_kwargs.py); files, URLs and configs are refused before
            anything is built.

    Returns:
        The network on the CPU, in training mode.

    Raises:
        PruneError: unknown name (with the nearest one), arguments that the network refuses, or weights that cannot be
            fetched.
    """
    check(name, kwargs or {})
    if kwargs and not is_code(name):  # without arguments the sizes are known to be sensible; users know their own
        state_shapes(name, classes, in_chans, kwargs)
    model = source_of(name).build(classes, in_chans, pretrained, kwargs or {})
    if is_code(name) and _DETECTION in sys.modules:  # a user's function may make a detector of torchvision
        from dist_prune.models import detectors

        return detectors.adapt(model)
    return model


def tensor_view(model: nn.Module) -> nn.Module:
    """A network that takes tensors of images: a detector of torchvision seen so, any other network as it is.

    Args:
        model: a bare network.
    """
    if _DETECTION not in sys.modules:
        return model
    from dist_prune.models import detectors

    return detectors.view(model)


def take_image_format(model: nn.Module, image: Mapping[str, Any]) -> None:
    """Let a detector of ours prepare the images of a list as its training did, in place; other networks stay.

    Args:
        model: of a bundle.
        image: ``mean``, ``std`` and ``size`` of its images.
    """
    if _DETECTION in sys.modules:
        from dist_prune.models import detectors

        detectors.take_image_format(model, image)


def check(name: str, kwargs: Mapping[str, Any]) -> None:
    """Check name and arguments of a network without building it.

    Args:
        name: of the backbone, see ``sources.py``.
        kwargs: arguments of the network's class.

    Raises:
        PruneError: unknown name, or arguments that are not those of its class.
    """
    source_of(name).check(kwargs)


def state_shapes(
    name: str, classes: int, in_chans: int, kwargs: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]] | None:
    """Compute the shapes of a network's parameters and buffers without allocating them.

    Args:
        name: of the backbone, see ``sources.py``.
        classes: number of outputs.
        in_chans: channels of the images.
        kwargs: arguments of the network's class.

    Returns:
        Name -> shape; None if the network's constructor needs values of tensors.

    Raises:
        PruneError: as ``create``, or the network is absurdly large.
    """
    check(name, kwargs or {})
    shapes = meta_shapes(lambda: source_of(name).build(classes, in_chans, False, kwargs or {}))
    if kwargs and shapes is not None and (values := sum(map(math.prod, shapes.values()))) > LARGE:
        plain = meta_shapes(lambda: source_of(name).build(classes, in_chans, False, {})) or {}
        if values > 4 * sum(map(math.prod, plain.values())):
            raise PruneError(f"backbone.kwargs: {shown(dict(kwargs))} would make {name} a network of {values:,} values")
    return shapes


def pretrained_classes(name: str) -> int | None:
    """The number of classes of a backbone's pretrained weights; None if it has none, or if that is not known."""
    return source_of(name).pretrained_classes()


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
