"""Detectors of torchvision by name, with random weights: ``torchvision:ssdlite320_mobilenet_v3_large`` for example."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.ssd import SSD

from dist_prune.errors import PruneError, shown
from dist_prune.models import detectors, model_kwargs

SINGLE_STAGE = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
TWO_STAGES = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
)
_SETTINGS = {  # arguments of torchvision's classes that are numbers
    SSD: ("score_thresh", "nms_thresh", "detections_per_img", "iou_thresh", "topk_candidates", "positive_fraction"),
    FasterRCNN: tuple(
        name
        for name in inspect.signature(FasterRCNN).parameters
        if name.startswith(("rpn_", "box_"))
        and not name.endswith(("generator", "head", "pool", "predictor", "weights"))
    ),
}


class TorchvisionDetector:
    """A network of ``torchvision.models.detection`` that takes tensors of images (see ``detectors.py``).

    Args:
        name: ``ssdlite320_mobilenet_v3_large`` for example.
    """

    def __init__(self, name: str):
        self.name = name

    def check(self, kwargs: Mapping[str, Any]) -> None:
        plain, _, tag = self.name.partition(".")
        if tag:
            raise PruneError(
                f"backbone.name: torchvision:{self.name} names weights {shown(tag)}, and weights of detectors are not "
                f"fetched. Write torchvision:{plain}, and name a file: backbone.checkpoint=FILE"
            )
        if plain not in list_names():
            raise PruneError(
                f"backbone.name: torchvision:{plain} is not offered. Detectors are {', '.join(list_names())}: SSD, and "
                "Faster R-CNN whose second stage has two linear layers"
            )
        allowed = {"trainable_backbone_layers", *_SETTINGS[SSD if plain in SINGLE_STAGE else FasterRCNN]}
        if plain == "ssdlite320_mobilenet_v3_large":
            allowed.add("width_mult")  # of the MobileNet below
        model_kwargs.check_values(kwargs, allowed, self.portable({})[0])

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        if in_chans != 3:
            raise PruneError(
                f"backbone.name: torchvision:{self.name} takes images of 3 channels, the data has {in_chans}"
            )
        if pretrained:
            raise PruneError(
                "backbone.pretrained: weights of torchvision's detectors are not fetched; download the file and name "
                "it: backbone.checkpoint=FILE"
            )
        builder = torchvision.models.get_model_builder(self.name)
        try:
            model = builder(weights=None, weights_backbone=None, num_classes=classes + 1, **kwargs)  # 0 is background
        except (TypeError, ValueError, RuntimeError) as error:
            raise PruneError(
                f"backbone torchvision:{self.name} could not be built with {dict(kwargs)}: {error}"
            ) from error
        transform: Any = model.transform
        config: Any = {  # how images are prepared, under timm's names
            "architecture": f"torchvision:{self.name}", "num_classes": classes, "input_size": (3, 320, 320),
            "pool_size": None, "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear",
            "mean": tuple(transform.image_mean), "std": tuple(transform.image_std),
        }  # fmt: skip
        model.pretrained_cfg = model.default_cfg = config
        return detectors.adapt(model)

    def pretrained_classes(self) -> int | None:
        return None

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"torchvision:{self.name}", dict(kwargs)

    def files(self) -> list[Path]:
        return []


def list_names() -> list[str]:
    """The names of torchvision's detectors that are offered."""
    return sorted((*SINGLE_STAGE, *TWO_STAGES))


def is_detector(name: str) -> bool:
    """Whether a name without weights is one of torchvision's detectors, offered or not."""
    return name in torchvision.models.list_models(module=torchvision.models.detection)
