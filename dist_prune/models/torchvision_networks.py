"""Classifiers of torchvision by name, with their published weights."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision
from timm.models import adapt_input_conv
from torch import nn

from dist_prune.errors import PruneError, nearest, shown
from dist_prune.models import model_kwargs, torchvision_detectors, torchvision_segmenters

# arguments that are set here: weights are fetched by backbone.pretrained; auxiliary heads exist in training mode only
_NEVER = {"weights", "progress", "num_classes", "kwargs", "pretrained", "aux_logits", "init_weights"}


class TorchvisionNetwork:
    """A network of ``torchvision.models``.

    Args:
        name: ``resnet50``, or ``resnet50.IMAGENET1K_V1`` for weights other than torchvision's default.
    """

    def __init__(self, name: str):
        self.name, _, self.tag = name.partition(".")

    def check(self, kwargs: Mapping[str, Any]) -> None:
        known = [*list_names(), *torchvision_segmenters.list_names(), *torchvision_detectors.list_names()]
        if self.name not in known:
            raise PruneError(
                f"backbone.name: torchvision has no classifier, segmenter or detector {shown(self.name)}."
                f"{nearest(self.name, known)} 'dist-prune list backbones torchvision:*' shows them"
            )
        self._weights()
        maker = torchvision.models.get_model_builder(self.name)
        allowed = {*inspect.signature(maker).parameters, *_class_arguments(maker)} - _NEVER
        model_kwargs.check_values(kwargs, allowed, f"torchvision:{self.name}")

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        builder = torchvision.models.get_model_builder(self.name)
        arguments: dict[str, Any] = {**kwargs, "num_classes": classes}
        if "GoogLeNet" in str(inspect.signature(builder).return_annotation) or self.name == "inception_v3":
            arguments |= {"aux_logits": False, "init_weights": True}
        try:
            model = builder(weights=None, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PruneError(
                f"backbone torchvision:{self.name} could not be built with {dict(kwargs)}: {error}"
            ) from error
        if pretrained:
            self._load(model, classes)
        if in_chans != 3:
            _fit_channels(model, in_chans)
        config = self._config(in_chans)
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model

    def pretrained_classes(self) -> int | None:
        return len(self._weights().meta["categories"])

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"torchvision:{self.name}{'.' if self.tag else ''}{self.tag}", dict(kwargs)

    def files(self) -> list[Path]:
        return []

    def _weights(self) -> Any:
        weights = torchvision.models.get_model_weights(self.name)
        names = [member.name for member in weights]
        tag = self.tag or "DEFAULT"
        if tag != "DEFAULT" and tag not in names:
            raise PruneError(
                f"backbone.name: torchvision:{self.name} has no weights {shown(tag)}.{nearest(tag, names)} "
                f"It has {', '.join(names)}"
            )
        return weights[tag]

    def _load(self, model: nn.Module, classes: int) -> None:
        """Fill in the published weights; a head for other classes, and auxiliary heads, are left out."""
        try:
            published = self._weights().get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise PruneError(
                f"backbone.pretrained: torchvision could not fetch the weights of {self.name}: {error}. Run it once "
                "where there is a network (they are kept in $TORCH_HOME), or name a file: backbone.checkpoint=FILE"
            ) from error
        own = model.state_dict()
        fitting = {
            name: tensor for name, tensor in published.items() if name in own and tensor.shape == own[name].shape
        }
        missing = [name for name in own if name not in fitting]
        head = {name.rpartition(".")[0] for name in missing}
        if len(head) > 1 or (missing and classes == self.pretrained_classes()):
            raise PruneError(
                f"backbone.pretrained: the weights do not fit with these arguments: {', '.join(missing[:4])}"
            )
        model.load_state_dict(own | fitting)

    def _config(self, in_chans: int) -> dict[str, Any]:
        weights = self._weights()
        transform = weights.transforms()
        mean, std = list(transform.mean), list(transform.std)
        if in_chans != 3:
            mean, std = [sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans
        crop, resize = transform.crop_size[0], transform.resize_size[0]
        return {
            "architecture": f"torchvision:{self.name}", "num_classes": len(weights.meta["categories"]),
            "input_size": (in_chans, crop, crop), "mean": tuple(mean), "std": tuple(std),
            "crop_pct": crop / resize, "interpolation": transform.interpolation.value, "crop_mode": "center",
        }  # fmt: skip


def list_names() -> list[str]:
    """The names of torchvision's image classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def last_linear(model: nn.Module) -> nn.Module | None:
    """The last linear layer of a network: its head. None if it has none."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _class_arguments(builder: Any) -> set[str]:
    """The arguments of the class that a builder of torchvision names as its result."""
    made = inspect.signature(builder).return_annotation
    made = vars(inspect.getmodule(builder)).get(made) if isinstance(made, str) else made
    return set(inspect.signature(made).parameters) if isinstance(made, type) else set()


def _fit_channels(model: nn.Module, in_chans: int) -> None:
    """Give the first convolution other input channels, in place; its weights follow timm's rule."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 3)
    first.weight = nn.Parameter(adapt_input_conv(in_chans, first.weight.data))
    first.in_channels = in_chans
