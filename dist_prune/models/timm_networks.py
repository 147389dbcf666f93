"""Networks of timm's registry, which has this package's, and those that timm reads from a folder or a hub."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import _hub
from torch import nn

from dist_prune import plugins
from dist_prune.errors import PruneError, nearest, shown
from dist_prune.models import model_kwargs, plugin_networks
from dist_prune.models.sources import LOCAL


class TimmNetwork:
    """A network by its name in timm's registry.

    Args:
        name: ``resnet50``, or ``resnet50.a1_in1k`` for a tag of weights.
    """

    def __init__(self, name: str):
        self.name = name

    def check(self, kwargs: Mapping[str, Any]) -> None:
        if isinstance(self.name, str):
            plugin_networks.make_known(self.name)
        if not isinstance(self.name, str) or not timm.is_model(self.name):
            plugin_networks.list_names()
            known = timm.list_models("*")
            broken = plugins.warning(plugins.unusable("backbone"))  # the name may be one of theirs
            raise PruneError(
                f"backbone.name: unknown backbone {shown(self.name)}.{nearest(str(self.name), known)} "
                f"'dist-prune list backbones' shows all {len(known)}." + (f"\n{broken}" if broken else "")
            )
        model_kwargs.check(self.name, kwargs)

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        return timm_model(self.name, classes, in_chans, pretrained, kwargs)

    def pretrained_classes(self) -> int | None:
        config = timm.get_pretrained_cfg(self.name)
        return config.num_classes if config is not None and config.has_weights else None

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return self.name, dict(kwargs)

    def files(self) -> list[Path]:
        return []


class SavedTimmNetwork:
    """A network that timm has saved in a folder or pushed to a hub: its config names the architecture.

    Args:
        name: ``local-dir:FOLDER`` or ``hf-hub:owner/name``, perhaps with ``@revision``.
    """

    def __init__(self, name: str):
        self.name = name
        self.source, _, self.place = name.partition(":")
        self._config: tuple[dict[str, Any], str, dict[str, Any]] | None = None

    @property
    def config(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Timm's pretrained config, the architecture, and the arguments of its class."""
        if self._config is None:
            self._config = self._read()
        return self._config

    def _read(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        local = self.source == LOCAL
        try:
            read = _hub.load_model_config_from_path if local else _hub.load_model_config_from_hf
            return read(str(Path(self.place).expanduser()) if local else self.place)
        except Exception as error:  # the hub's client raises errors of many libraries
            how = (
                "It needs config.json and model.safetensors, as timm's save_for_hf writes them"
                if local
                else "Run the command once where there is a network (files are kept in $HF_HOME), or download the "
                "repository and write local-dir:FOLDER"
            )
            reason = shown(str(error))[1:-1]
            raise PruneError(f"backbone.name: {self.name} cannot be read: {reason}. {how}") from error

    def check(self, kwargs: Mapping[str, Any]) -> None:
        _, architecture, _ = self.config
        TimmNetwork(architecture).check({})
        model_kwargs.check(architecture, kwargs)

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        if pretrained and self.source == LOCAL and not (self._folder / "model.safetensors").is_file():
            raise PruneError(
                f"backbone.pretrained: {self._folder} has no model.safetensors; other files of weights may run code. "
                "'dist-prune import-checkpoint' converts one"
            )
        if not pretrained:  # without the weights no file is read again
            name, merged = self.portable(kwargs)
            model = timm_model(name, classes, in_chans, False, merged)
            known = {field.name for field in dataclasses.fields(timm.models.PretrainedCfg)}
            config = {key: value for key, value in self.config[0].items() if key in known and value is not None}
            model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | config  # type: ignore[operator,assignment]
            return model
        place = f"{LOCAL}:{self._folder}" if self.source == LOCAL else self.name
        return timm_model(place, classes, in_chans, True, kwargs)

    @property
    def _folder(self) -> Path:
        return Path(self.place).expanduser()

    def pretrained_classes(self) -> int | None:
        return self.config[0].get("num_classes")

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        _, architecture, arguments = self.config
        allowed = model_kwargs.allowed(architecture)
        return architecture, {**{k: v for k, v in arguments.items() if k in allowed}, **kwargs}

    def files(self) -> list[Path]:
        if self.source != LOCAL:
            return []
        return [path for name in ("config.json", "model.safetensors") if (path := self._folder / name).is_file()]


def timm_model(name: str, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """``timm.create_model`` with errors for people.

    Args:
        name: as timm takes it.
        classes: number of outputs.
        in_chans: channels of the images.
        pretrained: whether timm fetches its pretrained weights.
        kwargs: arguments of the network's class.

    Raises:
        PruneError: the network refuses the arguments, or the weights cannot be fetched.
    """
    try:
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
