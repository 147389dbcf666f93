"""Image classifiers of Hugging Face's transformers, by a folder, a repository or a model type; safetensors only."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_prune.errors import PruneError, import_problem, nearest, shown

# fields of a config that say nothing about the network's layers, or that are set here
_NO_LAYERS = {
    "architectures", "id2label", "label2id", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "auto_map", "model_type", "num_labels", "problem_type", "use_cache", "return_dict", "_attn_implementation",
    "num_channels",
}  # fmt: skip
_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}


class TransformersNetwork:
    """An image classifier of transformers. Its output here is the logits alone.

    Args:
        place: a folder with config.json, a repository ``owner/name``, or a model type such as ``vit``.
    """

    def __init__(self, place: str):
        self.place = place
        self._loaded: Any = None

    @property
    def config(self) -> Any:
        """The configuration of transformers."""
        if self._loaded is None:
            self._loaded = self._read()
        return self._loaded

    @property
    def _folder(self) -> Path:
        return Path(self.place).expanduser()

    @property
    def _by_type(self) -> bool:
        return self.place in _model_types()  # a folder of that name is written ./vit

    def _read(self) -> Any:
        transformers = _transformers()
        if self._by_type:
            return transformers.AutoConfig.for_model(self.place)
        try:
            where = str(self._folder) if self._folder.is_dir() else self.place
            return transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        except Exception as error:  # the hub's client raises errors of many libraries
            near = "" if "/" in self.place else nearest(self.place, _model_types())
            raise PruneError(
                f"backbone.name: transformers:{self.place} cannot be read: {shown(str(error))[1:-1][:200]}.{near} It "
                "is a folder with config.json, a repository owner/name, or a model type such as vit"
            ) from error

    def check(self, kwargs: Mapping[str, Any]) -> None:
        if self.config.model_type not in _model_types():
            raise PruneError(
                f"backbone.name: transformers:{self.place} is a {self.config.model_type}; transformers has no image "
                f"classifier for it. It has them for {', '.join(_model_types())}"
            )
        known = {name for name in self.config.to_dict() if _is_layer_field(name)}
        for key, value in kwargs.items():
            if key not in known:
                raise PruneError(
                    f"backbone.kwargs: unexpected field {shown(key)} of {type(self.config).__name__}."
                    f"{nearest(str(key), known)}"
                )
            if not _is_plain(value):
                raise PruneError(
                    f"backbone.kwargs.{key}: {shown(value)} is neither a number, a word nor a list of them"
                )

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        transformers = _transformers()
        shape = {**kwargs, "num_labels": classes}
        if "num_channels" in self.config.to_dict():
            shape["num_channels"] = in_chans
        elif in_chans != 3:
            raise PruneError(
                f"backbone.name: transformers:{self.place} takes images of 3 channels, these have {in_chans}"
            )
        try:
            if pretrained:
                model = self._fetched(shape)
            else:
                config = type(self.config)(**{**self.config.to_dict(), **shape, "label2id": None, "id2label": None})
                config.num_labels = classes
                model = transformers.AutoModelForImageClassification.from_config(config)
        except (PruneError, NotImplementedError):
            raise
        except Exception as error:  # constructors raise errors of any class for values that they do not expect
            if "meta" in str(error).lower():
                raise
            reason = shown(str(error))[1:-1][:300]
            raise PruneError(f"backbone transformers:{self.place} could not be built with {shape}: {reason}") from error
        model.__class__ = _logits_alone(type(model))
        config = self._image_config(in_chans, _side_of(getattr(model.config, "image_size", None), 0))
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model

    def _fetched(self, shape: Mapping[str, Any]) -> nn.Module:
        if self._by_type:
            raise PruneError(
                f"backbone.pretrained: transformers:{self.place} is a model type, which has no weights: name a "
                "folder or a repository"
            )
        if self._folder.is_dir() and not list(self._folder.glob("*.safetensors")):
            raise PruneError(
                f"backbone.pretrained: {self._folder} has no .safetensors file; other files of weights may run code. "
                "model.save_pretrained(FOLDER) of a present transformers writes one"
            )
        where = str(self._folder) if self._folder.is_dir() else self.place
        labels = {number: str(number) for number in range(shape["num_labels"])}
        names = {} if shape["num_labels"] == self.config.num_labels else {
            "id2label": labels, "label2id": {name: number for number, name in labels.items()}
        }  # fmt: skip
        logging = _transformers().utils.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # a head for other classes is said by the train stage
        try:
            model = _transformers().AutoModelForImageClassification.from_pretrained(
                where, trust_remote_code=False, use_safetensors=True, ignore_mismatched_sizes=True, **shape, **names
            )
        finally:
            logging.set_verbosity(verbosity)
        return model.float()

    def pretrained_classes(self) -> int | None:
        return None if self._by_type else int(self.config.num_labels)

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The model type, and the fields of its config that differ from the type's own."""
        changed = {k: v for k, v in self.config.to_diff_dict().items() if _is_layer_field(k) and _is_plain(v)}
        return f"transformers:{self.config.model_type}", {**changed, **kwargs}

    def files(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted([*self._folder.glob("*.safetensors"), *self._folder.glob("*config.json")])

    def _image_config(self, in_chans: int, fixed: int) -> dict[str, Any]:
        """Timm's fields from preprocessor_config.json, if there is one, else the usual ones of transformers.

        Args:
            in_chans: channels of the images.
            fixed: the side that the network takes alone, in pixels; 0: any.
        """
        try:
            body = json.loads((self._folder / "preprocessor_config.json").read_text())
        except (OSError, ValueError):
            body = {}
        resized = _side_of(body.get("size"), fixed or 224)
        crop = fixed or _side_of(body.get("crop_size"), resized)
        mean, std = body.get("image_mean") or [0.5] * 3, body.get("image_std") or [0.5] * 3
        if len(mean) != in_chans:
            mean, std = [sum(mean) / len(mean)] * in_chans, [sum(std) / len(std)] * in_chans
        return {
            "architecture": "", "num_classes": int(self.config.num_labels), "input_size": (in_chans, crop, crop),
            "mean": tuple(mean), "std": tuple(std), "crop_pct": min(crop / resized, 1.0), "crop_mode": "center",
            "interpolation": _INTERPOLATIONS.get(body.get("resample", 2), "bilinear"),
        }  # fmt: skip


@cache
def _logits_alone(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose output is the logits; names of modules and tensors stay transformers' own."""

    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        return kind.forward(self, pixel_values=pixel_values, return_dict=True).logits

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise import_problem(error, "backbone.name: 'transformers:' needs transformers", "transformers") from error
    return transformers


def _model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    return sorted(set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) - {"timm_wrapper"})  # which names files of timm


def _side_of(size: Any, otherwise: int) -> int:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    if isinstance(size, list | tuple) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else otherwise


def _is_layer_field(name: str) -> bool:
    """Whether a field of a config sizes layers; those that lead to other networks, files or code are left alone."""
    return not (name in _NO_LAYERS or name.startswith("_") or "backbone" in name or "quantization" in name)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 256 and all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 256)
