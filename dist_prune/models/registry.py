"""Registration of this package's networks in timm's registry."""

import sys
from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from torch import nn

_TIMM_KWARGS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # timm passes them to every entry point


def register(
    name: str, make: Callable[..., nn.Module], first_conv: str, classifier: str, module: str, **other: Any
) -> None:
    """Let ``timm.create_model(name)`` call ``make(**kwargs)``: a network for 32x32 images without weights to fetch.

    Args:
        name: of the network, as in a recipe.
        make: the network's class or a function of it; takes ``num_classes`` and ``in_chans``.
        first_conv: module path of the first convolution, for timm's config.
        classifier: module path of the last linear layer, for timm's config.
        module: the file that registers it (``__name__``): timm lists networks by file.
        other: further keys of timm's pretrained config, for other images (``input_size``, ``mean``, ``std``).
    """
    config: dict[str, Any] = {
        "url": "", "num_classes": 10, "input_size": (3, 32, 32), "pool_size": None, "crop_pct": 1.0,
        "interpolation": "bilinear", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
        "first_conv": first_conv, "classifier": classifier, **other,
    }  # fmt: skip

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no weights to fetch; name a file in backbone.checkpoint")
        model = make(**{key: value for key, value in kwargs.items() if key not in _TIMM_KWARGS})
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model

    build.makes = make  # type: ignore[attr-defined]
    _register_entry(name, build, module, config)


def register_variant(name: str, base: str, change: Callable[[nn.Module], None], module: str) -> None:
    """Let ``timm.create_model(name)`` build a network of timm, weights included, and change it in place.

    Args:
        name: of the variant, as in a recipe; ``name.tag`` takes other weights of the same network.
        base: timm's name of the network with that of its weights (``vgg16_bn.tv_in1k``).
        change: changes the network in place.
        module: the file that registers it (``__name__``).
    """

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        arguments = {key: value for key, value in kwargs.items() if key not in _TIMM_KWARGS}
        tag = kwargs.get("pretrained_cfg")  # the part after the dot of the name
        network = f"{base.partition('.')[0]}.{tag}" if isinstance(tag, str) and tag else base
        model = timm.create_model(network, pretrained=pretrained, **arguments)
        change(model)
        return model

    build.base = base  # type: ignore[attr-defined]
    _register_entry(name, build, module, None)


def _register_entry(name: str, build: Callable[..., nn.Module], module: str, config: dict[str, Any] | None) -> None:
    """Register an entry point; timm's decorator reads its name, its module and that module's ``default_cfgs``."""
    namespace = sys.modules[module]
    build.__name__, build.__module__ = name, module
    if config is not None:
        namespace.__dict__.setdefault("default_cfgs", {})[name] = config
    namespace.__dict__[name] = register_model(build)


def init_he(model: nn.Module) -> None:
    """Initialise the weights of every convolution and linear layer by He's normal distribution, in place.

    Biases stay as torch has drawn them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
