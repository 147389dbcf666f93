"""One file or one folder a paper. A method is found by that name, or by the entry-point group ``dist_prune.methods``.

A folder's ``__init__`` exports the method's class; its machinery lies beside it and is known to no other paper.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel

from dist_prune.errors import PruneError, unknown
from dist_prune.methods.base import Method

GROUP = "dist_prune.methods"
SHARED = ("base", "options")  # modules that every paper may import; not methods


def list_names() -> list[str]:
    """Every method there is: the files and folders of this folder, and what other packages bring."""
    own = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED]
    return sorted({*own, *_foreign()})


def find(name: str) -> type[Method]:
    """The method's class; PruneError names the nearest one."""
    if name not in list_names():
        raise PruneError(unknown("method", name, list_names()))
    foreign = _foreign()
    if name in foreign:
        try:
            found = foreign[name].load()
        except Exception as error:  # another package's code
            raise PruneError(
                f"method {name!r} of another package cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise PruneError(f"the entry point {name!r} of {GROUP} is no subclass of dist_prune.methods.base.Method")
        return found
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Method) and f"{c.__module__}.".startswith(f"{module.__name__}.")
    ]
    if len(classes) != 1:
        file = f"{name}/__init__.py must export" if hasattr(module, "__path__") else f"{name}.py must hold"
        raise PruneError(f"methods/{file} exactly one Method class, it has {len(classes)}")
    return classes[0]


def build(section: Mapping[str, Any]) -> Method:
    """The method that a recipe's ``method`` section describes.

    Args:
        section: ``name``, and values of the method's options; options that are not named have their defaults.

    Returns:
        The method with its options.

    Raises:
        PruneError: there is no method of that name.
        pydantic.ValidationError: an option is unknown, or its value is not allowed (a loaded recipe has been checked).
    """
    kind = find(section["name"])
    return kind(kind.Options.model_validate({key: value for key, value in section.items() if key != "name"}))


def options_of(name: str) -> type[BaseModel]:
    """The options model of a method, for the recipe loader."""
    return find(name).Options


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
