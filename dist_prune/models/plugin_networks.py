"""Networks of other packages (entry points in ``dist_prune.backbones``), registered with timm at their first use.

An entry point names a callable ``make(num_classes, in_chans, ...)`` that returns a network, under the name of the
backbone; or a module whose import registers networks with timm, under any name.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import cast

import timm
from timm.models import register_model
from torch import nn

from dist_prune import plugins
from dist_prune.errors import PruneError
from dist_prune.models.registry import register

# keys of timm's pretrained config that a callable may set in an attribute ``default_cfg``
CONFIG_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


def make_known(name: str) -> None:
    """Let timm know the network of an entry point; nothing happens for other names.

    Args:
        name: of a backbone, perhaps unknown.

    Raises:
        PruneError: the entry point cannot be imported or is no network, or another network has the name.
    """
    plugin = plugins.find("backbone", name, _own(name)) if any(not p.is_module for p in _of(name)) else None
    if plugin is not None:
        _register(plugin)
    elif not timm.is_model(name):  # modules are imported only if the name is not known otherwise
        _import_modules()


def list_names() -> list[str]:
    """Import all entry points, so that timm knows their networks; those that fail are noted in ``plugins.unusable``.

    Returns:
        The names of the networks that are registered by callables.
    """
    _import_modules()
    for plugin in plugins.installed("backbone"):
        if not plugin.is_module:
            try:
                make_known(plugin.name)
            except PruneError as error:
                plugins.note_unusable(plugin, str(error))
    return [p.name for p in plugins.installed("backbone") if not p.is_module and timm.is_model(p.name)]


def origins() -> dict[str, plugins.Plugin]:
    """Name of each network of another package that timm knows -> its entry point (see ``list_names``)."""
    callables = {p.name: p for p in plugins.installed("backbone") if p in _REGISTERED}
    return callables | _FROM_MODULES


_REGISTERED: set[plugins.Plugin] = set()
_FROM_MODULES: dict[str, plugins.Plugin] = {}


def _of(name: str) -> list[plugins.Plugin]:
    return [plugin for plugin in plugins.installed("backbone") if plugin.name == name]


def _own(name: str) -> str:
    """Where a network comes from that has an entry point's name and is not its; empty if there is none."""
    if not timm.is_model(name) or any(plugin in _REGISTERED for plugin in _of(name)):
        return ""
    return f"timm's registry, {timm.model_entrypoint(name).__module__}"


def _register(plugin: plugins.Plugin) -> None:
    if plugin in _REGISTERED:
        return
    make = plugins.load(plugin)
    if not callable(make):
        raise PruneError(
            f"{plugin} is a {type(make).__name__}; a backbone is a class or a function that makes a network"
        )
    given = getattr(make, "default_cfg", None)
    config = {key: given[key] for key in CONFIG_KEYS if key in given} if isinstance(given, dict) else {}
    register(plugin.name, cast(Callable[..., nn.Module], make), "", "", __name__, **config)
    _REGISTERED.add(plugin)


def _import_modules() -> None:
    for plugin in plugins.installed("backbone"):
        if plugin.is_module:
            _import_module(plugin)


@cache
def _import_module(plugin: plugins.Plugin) -> None:
    """Import a module that registers networks with timm; one that replaces a network is undone and noted."""
    before = {name: timm.model_entrypoint(name) for name in timm.list_models("*")}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Overwriting")
            plugins.load(plugin)
            now = {name: timm.model_entrypoint(name) for name in timm.list_models("*")}
            replaced = [name for name in before if now.get(name) is not before[name]]
            for name in replaced:
                register_model(before[name])
    except PruneError as error:
        plugins.note_unusable(plugin, str(error))
        return
    _FROM_MODULES.update(dict.fromkeys(now.keys() - before.keys(), plugin))
    if replaced:
        plugins.note_unusable(
            plugin,
            f"{plugin} registers {', '.join(replaced)}, which timm's registry has from "
            f"{before[replaced[0]].__module__}; the earlier network stays. Rename the one of {plugin.package}",
        )
