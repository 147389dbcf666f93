"""How a network of this package enters timm's registry."""

import sys
from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from torch import nn

_TIMM_S_OWN = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # handed to every entry point


def register(
    name: str, make: Callable[..., nn.Module], first_conv: str, classifier: str, module: str, **other: Any
) -> None:
    """Let ``timm.create_model(name)`` call ``make(**kwargs)``: a network for 32x32 images without weights to fetch.

    Args:
        name: as a recipe says it.
        make: the network's class or a function; takes ``num_classes`` and ``in_chans``.
        first_conv: module path of the stem, as timm asks for it.
        classifier: module path of the last linear layer.
        module: the file that registers it (``__name__``): timm lists networks by file.
        other: further keys of timm's pretrained config, for images of another kind.
    """
    config: dict[str, Any] = {
        "url": "", "num_classes": 10, "input_size": (3, 32, 32), "pool_size": None, "crop_pct": 1.0,
        "interpolation": "bilinear", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
        "first_conv": first_conv, "classifier": classifier, **other,
    }  # fmt: skip

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no weights to fetch; name a file in backbone.checkpoint")
        model = make(**{key: value for key, value in kwargs.items() if key not in _TIMM_S_OWN})
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model

    build.makes = make  # type: ignore[attr-defined]
    _enter(name, build, module, config)


def register_variant(name: str, base: str, change: Callable[[nn.Module], None], module: str) -> None:
    """Let ``timm.create_model(name)`` build timm's ``base``, weights included, and ``change`` it in place.

    ``base`` names its weights (``vgg16_bn.tv_in1k``); ``name.tag`` takes others of the same network.
    """

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        given = {key: value for key, value in kwargs.items() if key not in _TIMM_S_OWN}
        tag = kwargs.get("pretrained_cfg")  # what stands behind the dot of the name that was asked for
        found = f"{base.partition('.')[0]}.{tag}" if isinstance(tag, str) and tag else base
        model = timm.create_model(found, pretrained=pretrained, **given)
        change(model)
        return model

    build.base = base  # type: ignore[attr-defined]
    _enter(name, build, module, None)


def _enter(name: str, build: Callable[..., nn.Module], module: str, config: dict[str, Any] | None) -> None:
    """timm's decorator reads the entry point's name, its module and that module's ``default_cfgs``."""
    home = sys.modules[module]
    build.__name__, build.__module__ = name, module
    if config is not None:
        home.__dict__.setdefault("default_cfgs", {})[name] = config
    home.__dict__[name] = register_model(build)


def init_he(model: nn.Module) -> None:
    """He's normal initialisation of every convolution and linear layer; biases stay as torch draws them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
