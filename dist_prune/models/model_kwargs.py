"""The arguments of a network that a recipe or a bundle may set: those of its class, as plain values.

timm also passes every entry point names of files, URLs and configs (``checkpoint_path``, ``pretrained_cfg``,
``cache_dir``, ...). None of them is an argument of a network's class, so none of them is allowed here.
"""

import dataclasses
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import timm
from torch import nn

from dist_prune.errors import PruneError, nearest, shown
from dist_prune.models import torchvision_networks

# arguments of network classes that are no plain values, are set by this package, or name a file or URL
NEVER = {
    "self", "args", "kwargs", "cfg", "cfgs", "model_cfg", "block_cfg", "block_args", "backbone", "hybrid_backbone",
    "num_classes", "in_chans", "device", "dtype", "variant", "model_name", "features_only", "feature_cfg",
    "out_indices", "feature_location", "kwargs_filter", "pruned", "checkpoint_path", "cache_dir", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn", "pretrained_model_args",
    "scriptable", "exportable", "no_jit",
}  # fmt: skip
LARGEST = 65536  # absolute value of a number
LONGEST = 256  # entries of a list, characters of a text
DEEPEST = 4  # lists in lists
WORD = re.compile(r"[\w.+-]*")


def allowed(name: str) -> set[str]:
    """The names of the arguments that a recipe may set, from the signature of the network's class.

    Args:
        name: of a backbone that timm knows; it is not built.
    """
    if torchvision_networks.is_torchvision(name):
        return torchvision_networks.allowed(name)
    entry = timm.model_entrypoint(name)
    makes, base = getattr(entry, "makes", None), getattr(entry, "base", None)
    if base is not None:
        return allowed(base)
    makers = [makes] if makes is not None else _classes(entry)
    return {argument for maker in makers for argument in _arguments(maker)} - NEVER


def check(name: str, kwargs: Mapping[str, Any]) -> None:
    """Check the arguments that a recipe or a bundle sets, without building the network.

    Args:
        name: of a backbone that timm knows.
        kwargs: argument -> value.

    Raises:
        PruneError: the network's class has no such argument, or a value is not plain and small.
    """
    if not isinstance(kwargs, Mapping):
        raise PruneError(f"backbone.kwargs: a mapping of arguments, not {shown(kwargs)}")
    if not kwargs:
        return
    known = allowed(name)
    for key, value in kwargs.items():
        if key not in known:
            few = ", ".join(sorted(known)) or "none"
            raise PruneError(
                f"backbone.kwargs: unexpected keyword argument {shown(key)}.{nearest(str(key), known)} "
                f"{name} takes {few}; files, URLs and configs are never taken from here"
            )
        if trouble := _trouble(value):
            raise PruneError(f"backbone.kwargs.{key}: {trouble}")


def _trouble(value: Any, depth: int = 0) -> str:
    """The reason why a value is refused, or ""."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, int | float):
        fine = math.isfinite(value) if isinstance(value, float) else True
        return "" if fine and abs(value) <= LARGEST else f"{shown(value)} is too large; {LARGEST:,} is the most"
    if isinstance(value, str):
        if len(value) > LONGEST or not WORD.fullmatch(value):
            return f"{shown(value)} is no name of a layer or a mode (letters, digits and . + - _)"
        return ""
    if isinstance(value, list | tuple):
        if len(value) > LONGEST or depth >= DEEPEST:
            return f"at most {LONGEST} entries, {DEEPEST} lists inside one another"
        return next(filter(None, (_trouble(inner, depth + 1) for inner in value)), "")
    return f"{shown(value)} is neither a number, a word nor a list of them"


def _arguments(maker: Callable[..., Any]) -> set[str]:
    """The argument names of a class or function; with ``**kwargs``, also those of its bases and its config's fields."""
    names: set[str] = set()
    for one in (
        (c for c in maker.__mro__ if c is not nn.Module and c is not object) if isinstance(maker, type) else (maker,)
    ):
        parameters = inspect.signature(one).parameters.values()
        names |= {p.name for p in parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
        for parameter in parameters:
            if parameter.name == "cfg" and dataclasses.is_dataclass(parameter.annotation):
                names |= {field.name for field in dataclasses.fields(parameter.annotation)}
    return names


def _classes(entry: Callable[..., Any]) -> list[type[nn.Module]]:
    """The classes that an entry point of timm passes to its builder, read from the names that its code uses.

    An entry point calls functions of its own file, and one of those calls ``build_model_with_cfg(Class, ...)``.
    """
    waiting: list[Any] = [inspect.unwrap(entry)]
    seen: set[Any] = set()
    classes: dict[type[nn.Module], None] = {}
    while waiting:
        function = waiting.pop()
        seen.add(function)
        names = _names(function.__code__)
        builds = "build_model_with_cfg" in names
        namespace = vars(sys.modules[function.__module__])
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in [*(namespace.get(name) for name in sorted(names)), *defaults]:
            if isinstance(value, types.FunctionType):
                if value.__module__ == function.__module__ and value not in seen:
                    waiting.append(inspect.unwrap(value))
            elif builds and isinstance(value, type) and issubclass(value, nn.Module):
                classes[value] = None
    return list(classes)


def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner)) if inner else set(code.co_names)
