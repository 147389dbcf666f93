"""The registry of tasks: one file per task, whose name is the task's name.

Other packages add tasks by the entry-point group ``dist_prune.tasks`` (see ``dist_prune/plugins.py``).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from dist_prune.errors import PruneError, nearest, shown, unknown
from dist_prune.registry import Registry
from dist_prune.tasks.base import Task

SHARED = ("base", "outputs", "tallies", "colours", "similarity", "primary")  # modules that tasks share; not tasks
_TASKS = Registry("task", __name__, Task, SHARED, "dist_prune.tasks.base.Task")


def list_names() -> list[str]:
    """The names of all tasks, sorted: those of this package, and those of other packages' entry points."""
    return _TASKS.list_names()


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
    return _TASKS.find(name)


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


def anchor_layers(layers: Iterable[str]) -> dict[str, str]:
    """The layers among module paths that end a head of torchvision's detectors -> why their channels stay."""
    from dist_prune.tasks import detection

    return detection.anchor_layers(list(layers))
