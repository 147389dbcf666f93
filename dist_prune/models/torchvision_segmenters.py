"""Segmenters of torchvision by name, with random weights: ``torchvision:lraspp_mobilenet_v3_large`` for example."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3

from dist_prune.errors import PruneError, shown
from dist_prune.models import model_kwargs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NEVER = {"weights", "weights_backbone", "progress", "num_classes", "kwargs"}  # set here


class TorchvisionSegmenter:
    """A network of ``torchvision.models.segmentation``. It returns a dict: ``out`` and perhaps ``aux``.

    Args:
        name: ``lraspp_mobilenet_v3_large`` for example.
    """

    def __init__(self, name: str):
        self.name = name

    def check(self, kwargs: Mapping[str, Any]) -> None:
        plain, _, tag = self.name.partition(".")
        if tag:
            raise PruneError(
                f"backbone.name: torchvision:{self.name} names weights {shown(tag)}, and weights of segmenters are not "
                f"fetched. Write torchvision:{plain}, and name a file: backbone.checkpoint=FILE"
            )
        builder = torchvision.models.get_model_builder(self.name)
        model_kwargs.check_values(kwargs, set(inspect.signature(builder).parameters) - _NEVER, self.portable({})[0])

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        if in_chans != 3:
            raise PruneError(
                f"backbone.name: torchvision:{self.name} takes images of 3 channels, the data has {in_chans}"
            )
        if pretrained:
            raise PruneError(
                "backbone.pretrained: weights of torchvision's segmenters are not fetched; download the file and name "
                "it: backbone.checkpoint=FILE"
            )
        builder = torchvision.models.get_model_builder(self.name)
        try:
            model = builder(weights=None, weights_backbone=None, num_classes=classes, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PruneError(
                f"backbone torchvision:{self.name} could not be built with {dict(kwargs)}: {error}"
            ) from error
        config: Any = {  # how images are prepared, under timm's names
            "architecture": f"torchvision:{self.name}", "num_classes": classes, "input_size": (3, 224, 224),
            "pool_size": None, "crop_pct": 1.0, "interpolation": "bilinear", "mean": MEAN, "std": STD,
        }  # fmt: skip
        model.pretrained_cfg = model.default_cfg = config
        return model

    def pretrained_classes(self) -> int | None:
        return None

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"torchvision:{self.name}", dict(kwargs)

    def files(self) -> list[Path]:
        return []


AUXILIARY = "aux_classifier"  # the head that only training reads


def head_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a segmenter of torchvision that have one channel for each class; none of another network."""
    if isinstance(model, LRASPP):
        head: Any = model.classifier
        return head.low_classifier, head.high_classifier
    if not isinstance(model, FCN | DeepLabV3):
        return ()
    heads: list[Any] = [model.classifier, *([model.aux_classifier] if model.aux_classifier is not None else [])]
    return tuple(head[-1] for head in heads)


def fit_auxiliary(
    model: nn.Module, weights: Mapping[str, Tensor], name: str, trains: bool, say: Callable[[str], None]
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Bring together a checkpoint with an auxiliary head and a segmenter without one, or the other way.

    Args:
        model: the segmenter; of other networks nothing is changed.
        weights: name -> tensor of the checkpoint.
        name: of its file.
        trains: whether a training follows: an auxiliary head that the file lacks keeps its initial values then.
        say: called with a line for what is left out or new.

    Returns:
        The weights that the network takes, and the names of its tensors that the file lacks.
    """
    if not head_layers(model):
        return weights, ()
    own = [entry for entry in model.state_dict() if entry.startswith(f"{AUXILIARY}.")]
    found = [entry for entry in weights if entry.startswith(f"{AUXILIARY}.")]
    if found and not own:
        say(
            f"{name}: its auxiliary head ({len(found)} tensors) is left out; backbone.kwargs.aux_loss=true builds the "
            "network with one"
        )
        return {entry: tensor for entry, tensor in weights.items() if entry not in found}, ()
    if own and not found and trains:
        say(f"{name} has no auxiliary head: that of the network starts from its initial values")
        return weights, tuple(own)
    return weights, ()


def list_names() -> list[str]:
    """The names of torchvision's segmenters."""
    return torchvision.models.list_models(module=torchvision.models.segmentation)
