"""Outputs of networks: one tensor, or tensors in tuples, lists, mappings and data classes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

MAIN = ("logits", "out", "output", "prediction")  # names of the main output, the first that is there


def map_tensors(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """Apply a function to every tensor of a network's outputs.

    Args:
        function: of one tensor.
        outputs: one tensor, or tuples, lists, mappings and data classes of them.

    Returns:
        Outputs of the same form; mappings and data classes become dicts.
    """
    if isinstance(outputs, Tensor):
        return function(outputs)
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        return {key: map_tensors(function, value) for key, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return [map_tensors(function, value) for value in outputs]
    return outputs


def named_tensors(outputs: Any, main: str, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every tensor of a network's outputs, in order.

    Args:
        outputs: of a network.
        main: name of a single tensor. Tensors of tuples and lists are ``<main>_0`` and so on; those of mappings and
            data classes have their keys.
        prefix: of names.
    """
    if isinstance(outputs, Tensor):
        yield prefix or main, outputs
        return
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from named_tensors(value, main, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(outputs, list | tuple):
        for number, value in enumerate(outputs):
            yield from named_tensors(value, main, f"{prefix or main}_{number}")


def main_output(outputs: Any) -> Any:
    """The main output: the tensor itself, the first of a tuple or list, or the value of the first name of ``MAIN``.

    A mapping or data class without such a name gives its first tensor. None if there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        named = [outputs[key] for key in MAIN if isinstance(outputs.get(key), Tensor)]
        return next(iter([*named, *(value for value in outputs.values() if isinstance(value, Tensor))]), None)
    if isinstance(outputs, list | tuple):
        return next((main_output(value) for value in outputs), None)
    return None


def auxiliary_output(outputs: Any) -> Tensor | None:
    """The output of an auxiliary head: the key or field ``aux``; None if there is none."""
    value = outputs.get("aux") if isinstance(outputs, Mapping) else getattr(outputs, "aux", None)
    return value if isinstance(value, Tensor) else None


def shape_text(outputs: Any) -> str:
    """The form and shapes of a network's outputs, for messages."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named_tensors(outputs, "tensor"))
    return f"a {type(outputs).__name__} with {shapes or 'no tensor'}"
