"""The registry of methods: one file or one folder per paper, whose name is the method's name.

A folder's ``__init__`` exports the method's class; its other files are imported by no other paper. Other packages add
methods by the entry-point group ``dist_prune.methods`` (see ``dist_prune/plugins.py``).
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dist_prune.config.familiar_names import canonical_method, method_suggestion
from dist_prune.errors import PruneError, shown, unknown
from dist_prune.methods.base import Method
from dist_prune.registry import Registry

SHARED = ("base", "context", "needs", "options", "scores")  # modules that every paper may import; not methods
_METHODS = Registry("method", __name__, Method, SHARED, "dist_prune.Method")


def list_names() -> list[str]:
    """The names of all methods, sorted: those of this package, and those of other packages' entry points."""
    return _METHODS.list_names()


def find(name: str) -> type[Method]:
    """Find the class of a method.

    Args:
        name: of the method, or one that other libraries have for it (config/familiar_names.py).

    Raises:
        PruneError: there is no method of that name (the nearest one is named), several packages have one, another
            package's cannot be imported, or its module does not hold exactly one subclass of ``Method``.
    """
    name = canonical_method(name)
    if name not in list_names():
        if suggestion := method_suggestion(name):
            raise PruneError(f"unknown method {shown(name)}.{suggestion} 'dist-prune list methods' lists all.")
        raise PruneError(unknown("method", name, list_names()))
    return _METHODS.find(name)


def build(section: Mapping[str, Any]) -> Method:
    """Build the method that a recipe's ``method`` section describes.

    Args:
        section: ``name``, and values of the method's options. Missing options have their defaults.

    Returns:
        The method with its options.

    Raises:
        PruneError: there is no method of that name.
        pydantic.ValidationError: an option is unknown, or its value is not allowed (a loaded recipe has been checked).
    """
    method_class = find(section["name"])
    return method_class(
        method_class.Options.model_validate({key: value for key, value in section.items() if key != "name"})
    )


def options_of(name: str) -> type[BaseModel]:
    """The options model of a method, for the recipe loader.

    Raises:
        PruneError: see ``find``.
    """
    return find(name).Options
