"""The first input of a module's call, read and replaced, also when the module is called by keyword."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What enters a layer, also where it is called by keyword (``conv(input=x)``)."""
    return args[0] if args else next(iter(kwargs.values()))


def with_first_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call with another first input: what a pre-hook with ``with_kwargs=True`` returns."""
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})
