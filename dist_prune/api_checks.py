"""Checks of what a caller passes to the library, before any work: the argument, its value, what is allowed."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from dist_prune.errors import PruneError, shown, unknown
from dist_prune.methods.scores import Scores
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan

ORIGINS = {
    nn.Module: "a torch.nn.Module",
    DependencyGraph: "the graph of dist_prune.trace",
    Scores: "the result of dist_prune.score",
    Plan: "a plan of dist_prune.select, or Plan.from_json",
}


def check_types(**arguments: tuple[Any, type]) -> None:
    """Check the classes of arguments.

    Args:
        **arguments: name -> (value, class that it has to be of, a key of ``ORIGINS``).

    Raises:
        PruneError: a value is of another class.
    """
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            what = shown(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
            raise PruneError(f"{name}: {what} is given, and it has to be {ORIGINS[kind]}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check an argument that is one of some words.

    Raises:
        PruneError: it is another value.
    """
    if value not in allowed:
        raise PruneError(f"{name}: {unknown('value', str(value), allowed)}")


def check_count(name: str, value: Any, none: str = "", least: int = 1) -> None:
    """Check a whole number.

    Args:
        name: of the argument.
        value: its value.
        none: what None means; empty: None is not allowed.
        least: the smallest value.

    Raises:
        PruneError: it is another value.
    """
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        more = f", or None for {none}" if none else ""
        raise PruneError(f"{name}: {shown(value)} is given; write a whole number from {least} on{more}")


def check_positive(name: str, value: Any, none: str) -> None:
    """Check a finite number above 0.

    Args:
        name: of the argument.
        value: its value.
        none: what None means.

    Raises:
        PruneError: it is another value.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
        raise PruneError(f"{name}: {shown(value)} is given; write a number above 0, or None for {none}")


def image_shape(example: Any) -> tuple[int, ...]:
    """The shape (C, H, W) of an example: images (n, C, H, W) or (C, H, W), or the shape itself.

    Raises:
        PruneError: it is neither.
    """
    if isinstance(example, Tensor) and example.dim() in (3, 4) and example.numel():
        return tuple(example.shape[-3:])
    sides = example if isinstance(example, Sequence) and not isinstance(example, str) else ()
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and int(side) > 0 for side in sides)
    if len(sides) == 3 and whole:
        return tuple(int(side) for side in sides)
    given = f"a tensor of shape {tuple(example.shape)}" if isinstance(example, Tensor) else shown(example)
    raise PruneError(
        f"example: {given} is given; write images (n, C, H, W), or the shape (C, H, W) as whole numbers, for example "
        "(3, 224, 224)"
    )
