"""Networks of torchvision by the name ``torchvision:NAME``, for example ``torchvision:lraspp_mobilenet_v3_large``."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision import models

from dist_prune.errors import PruneError, nearest, shown

PREFIX = "torchvision:"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SET_HERE = {"weights", "weights_backbone", "progress", "num_classes", "kwargs"}


def is_torchvision(name: object) -> bool:
    """Whether a backbone's name is that of a network of torchvision."""
    return isinstance(name, str) and name.startswith(PREFIX)


def check(name: str) -> None:
    """Check that there is a network of this name.

    Raises:
        PruneError: there is none; names the nearest one.
    """
    known = models.list_models()
    if name.removeprefix(PREFIX) not in known:
        raise PruneError(
            f"backbone.name: torchvision has no network {shown(name.removeprefix(PREFIX))}."
            f"{nearest(name.removeprefix(PREFIX), known)} It has {len(known)}, for example {', '.join(known[:3])}"
        )


def allowed(name: str) -> set[str]:
    """The arguments that a recipe may set: those of the network's builder, without weights and counts."""
    return set(inspect.signature(models.get_model_builder(name.removeprefix(PREFIX))).parameters) - _SET_HERE


def build(name: str, outputs: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: with the prefix.
        outputs: number of classes.
        in_chans: channels of the images, which have to be 3.
        pretrained: has to be False; weights are named by ``backbone.checkpoint``.
        kwargs: arguments of the builder.

    Raises:
        PruneError: torchvision's networks take images of 3 channels, and their weights are not fetched.
    """
    if in_chans != 3:
        raise PruneError(f"backbone.name: {name} takes images of 3 channels, the data has {in_chans}")
    if pretrained:
        raise PruneError(
            "backbone.pretrained: weights of torchvision are not fetched; download the file and name it: "
            "backbone.checkpoint=FILE"
        )
    builder = models.get_model_builder(name.removeprefix(PREFIX))
    own = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    model = builder(weights=None, num_classes=outputs, **own, **dict(kwargs))
    config: Any = {  # how images are prepared, under timm's names
        "num_classes": outputs, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 1.0,
        "interpolation": "bilinear", "mean": MEAN, "std": STD,
    }  # fmt: skip
    model.pretrained_cfg = model.default_cfg = config
    return model
