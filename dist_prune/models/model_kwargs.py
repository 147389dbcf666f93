"""Which arguments of a network a recipe or a bundle may give: those of its class, as plain values, and no others.

timm hands every entry point what names files, URLs and configs as well (``checkpoint_path``, ``pretrained_cfg``,
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

# arguments of some network's class that are no plain values, that this package gives itself, or that name a place
NEVER = {
    "self", "args", "kwargs", "cfg", "cfgs", "model_cfg", "block_cfg", "block_args", "backbone", "hybrid_backbone",
    "num_classes", "in_chans", "device", "dtype", "variant", "model_name", "features_only", "feature_cfg",
    "out_indices", "feature_location", "kwargs_filter", "pruned", "checkpoint_path", "cache_dir", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn", "pretrained_model_args",
    "scriptable", "exportable", "no_jit",
}  # fmt: skip
LARGEST, LONGEST, DEEPEST = 65536, 256, 4  # a number; entries of a list, characters of a text; lists in lists
WORD = re.compile(r"[\w.+-]*")


def allowed(name: str) -> set[str]:
    """The arguments that a recipe may give the network ``name``, from the signature of its class. Builds nothing."""
    entry = timm.model_entrypoint(name)
    makes, base = getattr(entry, "makes", None), getattr(entry, "base", None)
    if base is not None:
        return allowed(base)
    makers = [makes] if makes is not None else _classes(entry)
    return {argument for maker in makers for argument in _arguments(maker)} - NEVER


def check(name: str, given: Mapping[str, Any]) -> None:
    """PruneError for an argument that the network's class does not have, or a value that is no plain small one."""
    if not isinstance(given, Mapping):
        raise PruneError(f"backbone.kwargs: a mapping of arguments, not {shown(given)}")
    if not given:
        return
    known = allowed(name)
    for key, value in given.items():
        if key not in known:
            few = ", ".join(sorted(known)) or "none"
            raise PruneError(
                f"backbone.kwargs: unexpected keyword argument {shown(key)}.{nearest(str(key), known)} "
                f"{name} takes {few}; files, URLs and configs are never taken from here"
            )
        if trouble := _trouble(value):
            raise PruneError(f"backbone.kwargs.{key}: {trouble}")


def _trouble(value: Any, depth: int = 0) -> str:
    """What is wrong with a value, or nothing."""
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
    """The names that a class or function takes; with ``**kwargs``, those of its bases and of its config's fields."""
    found: set[str] = set()
    for one in (
        (c for c in maker.__mro__ if c is not nn.Module and c is not object) if isinstance(maker, type) else (maker,)
    ):
        parameters = inspect.signature(one).parameters.values()
        found |= {p.name for p in parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
        for parameter in parameters:
            if parameter.name == "cfg" and dataclasses.is_dataclass(parameter.annotation):
                found |= {field.name for field in dataclasses.fields(parameter.annotation)}
    return found


def _classes(entry: Callable[..., Any]) -> list[type[nn.Module]]:
    """The classes that an entry point of timm hands to its builder, read from the names that its code uses.

    An entry point calls functions of its own file, and one of those calls ``build_model_with_cfg(Class, ...)``.
    """
    waiting: list[Any] = [inspect.unwrap(entry)]
    seen: set[Any] = set()
    found: dict[type[nn.Module], None] = {}
    while waiting:
        function = waiting.pop()
        seen.add(function)
        names = _names(function.__code__)
        builds = "build_model_with_cfg" in names
        home = vars(sys.modules[function.__module__])
        handed = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in [*(home.get(name) for name in sorted(names)), *handed]:
            if isinstance(value, types.FunctionType):
                if value.__module__ == function.__module__ and value not in seen:
                    waiting.append(inspect.unwrap(value))
            elif builds and isinstance(value, type) and issubclass(value, nn.Module):
                found[value] = None
    return list(found)


def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner)) if inner else set(code.co_names)
