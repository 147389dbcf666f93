"""The first input of a module's call, read and replaced; modules may be called by keyword."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first input of a call, also if the layer is called by keyword (``conv(input=x)``).

    Args:
        args: positional arguments, as a hook with ``with_kwargs=True`` gets them.
        kwargs: keyword arguments; the first one counts if ``args`` is empty.
    """
    return args[0] if args else next(iter(kwargs.values()))


def with_first_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return (args, kwargs) of a call with ``value`` as first input, as a pre-hook with ``with_kwargs=True`` does."""
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})
