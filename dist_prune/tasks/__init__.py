"""The registry of tasks: one file per task, whose name is the task's name.

Other packages add tasks by the entry-point group ``dist_prune.tasks`` (see ``dist_prune/plugins.py``).
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dist_prune import plugins
from dist_prune.errors import PruneError, nearest, shown, unknown
from dist_prune.tasks.base import Task

SHARED = ("base", "outputs", "tallies", "colours", "similarity")  # modules that tasks share; not tasks


def list_names() -> list[str]:
    """The names of all tasks, sorted: those of this package, and those of other packages' entry points."""
    return sorted({*_own_names(), *plugins.names("task")})


def find(name: str) -> type[Task]:
    """Find the class of a task.

    Args:
        name: of the task.

    Raises:
        PruneError: there is no task of that name (the nearest one is named), several packages have one, or another
            package's cannot be imported.
    """
    if name not in list_names():
        raise PruneError(f"task.name: {unknown('task', name, list_names())}")
    plugin = plugins.find("task", name, f"dist_prune/tasks/{name}.py" if name in _own_names() else "")
    if plugin is not None:
        loaded = plugins.load(plugin)
        if not (isinstance(loaded, type) and issubclass(loaded, Task)):
            raise PruneError(f"{plugin} is no subclass of dist_prune.tasks.base.Task")
        return loaded
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Task) and c.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"tasks/{name}.py must hold exactly one Task class, it has {len(classes)}"
    return classes[0]


def build(section: Mapping[str, Any]) -> Task:
    """Build the task that a recipe's ``task`` section describes.

    Args:
        section: ``name``, and values of the task's options. Missing options have their defaults.

    Raises:
        PruneError: there is no task of that name, an option is unknown, or its value is not allowed.
    """
    kind = find(str(section.get("name", "classification")))
    values = {key: value for key, value in section.items() if key != "name"}
    try:
        return kind(kind.Options.model_validate(values))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                allowed = list(kind.Options.model_fields)
                options = nearest(key, allowed) or f" The task {kind.name} takes {', '.join(allowed) or 'no keys'}."
                lines.append(f"task.{key}: unknown key.{options}")
            else:
                lines.append(f"task.{key}: {item['msg'].removeprefix('Value error, ')} (got {shown(item['input'])})")
        raise PruneError("\n".join(lines)) from error


def _own_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED]
