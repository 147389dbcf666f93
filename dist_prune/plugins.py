"""Entry points of installed packages: backbones, datasets, methods, costs and tasks of others, read at their first use.

A package declares them in its pyproject.toml:

    [project.entry-points."dist_prune.methods"]
    mean_activation = "my_package.mean_activation:MeanActivation"

Their names are known without importing the package. An object is imported when a recipe or a call names it.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from dist_prune.errors import PruneError, nearest, shown
from dist_prune.fileio import digest

Kind = Literal["backbone", "dataset", "method", "cost", "task"]
KINDS: tuple[Kind, ...] = ("backbone", "dataset", "method", "cost", "task")


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package.

    Attributes:
        kind: what it adds.
        name: as in a recipe; of a module of backbones: any.
        value: ``module:object``, or ``module`` alone.
        distribution: name of the package that pip installed.
        version: its version.
    """

    kind: Kind
    name: str
    value: str
    distribution: str
    version: str

    @property
    def package(self) -> str:
        """Name and version of the package."""
        return f"{self.distribution} {self.version}"

    @property
    def is_module(self) -> bool:
        """Whether the entry point names a module and no object of it."""
        return ":" not in self.value

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of {self.package} ({self.value})"


_UNUSABLE: dict[Plugin, str] = {}


def group_of(kind: Kind) -> str:
    """Name of the entry-point group of a kind, ``dist_prune.methods`` for example."""
    return f"dist_prune.{kind}s"


def installed(kind: Kind) -> tuple[Plugin, ...]:
    """The entry points of a kind, sorted by name and package; nothing is imported."""
    return _read(tuple((place, _written_ns(place)) for place in sys.path)).get(kind, ())


def _written_ns(place: str) -> int:
    """When something was last installed in a folder; 0 if it is none."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


@cache
def _read(places: tuple[tuple[str, int], ...]) -> dict[Kind, tuple[Plugin, ...]]:
    """The entry points that the folders of ``sys.path`` have; read again if something was installed in one since.

    All kinds at once: the system reads a file of every installed package whatever group it is asked for.
    """
    every, found = entry_points(), {}
    for kind in get_args(Kind):
        of_kind = set()
        for point in every.select(group=group_of(kind)):
            dist = point.dist
            version = str(dist.version) if dist else "?"
            of_kind.add(Plugin(kind, point.name, point.value, dist.name if dist else "?", version))
        found[kind] = tuple(sorted(of_kind, key=lambda plugin: (plugin.name, plugin.package, plugin.value)))
    return found


def names(kind: Kind) -> list[str]:
    """The names of a kind's entry points, sorted, each once."""
    return sorted({plugin.name for plugin in installed(kind)})


def find(kind: Kind, name: str, own: str = "") -> Plugin | None:
    """Find the entry point of a name.

    Args:
        kind: what the name should name.
        name: as in a recipe.
        own: where dist_prune itself has something of this name; empty if it has not.

    Returns:
        The entry point, or None if no package has one of this name.

    Raises:
        PruneError: several packages, or a package and dist_prune, have the name.
    """
    same = [plugin for plugin in installed(kind) if plugin.name == name]
    origins = [*([f"dist_prune itself ({own})"] if own else []), *(f"{p.package} ({p.value})" for p in same)]
    if same and len(origins) > 1:
        packages = " or ".join(dict.fromkeys(plugin.distribution for plugin in same))
        raise PruneError(
            f"{kind} {shown(name)} is a name of {' and of '.join(origins)}, and only one of them can be meant. "
            f"Uninstall {packages}, or rename its entry point in {group_of(kind)}"
        )
    return same[0] if same else None


@cache
def load(plugin: Plugin) -> Any:
    """Import the object, or the module, that an entry point names.

    Raises:
        PruneError: it cannot be imported; the text names the package and the error.
    """
    module, _, attributes = plugin.value.partition(":")
    try:
        found: Any = importlib.import_module(module.strip())
        for attribute in filter(None, attributes.partition("[")[0].strip().split(".")):
            found = getattr(found, attribute)
    except (Exception, SystemExit) as error:  # code of another package
        raise PruneError(f"{plugin} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def load_all(
    kind: Kind, use: Callable[[Plugin, Any], None], only: Callable[[Plugin], bool] = lambda plugin: True
) -> None:
    """Import every entry point of a kind, and hand each to ``use``; those that fail are noted in ``unusable``.

    Args:
        kind: of the entry points.
        use: takes an entry point and its object; a PruneError of it counts as a failure.
        only: chooses among the entry points.
    """
    for plugin in filter(only, installed(kind)):
        try:
            use(plugin, load(plugin))
        except PruneError as error:
            note_unusable(plugin, str(error))


def note_unusable(plugin: Plugin, why: str) -> None:
    """Note an entry point that cannot be used, for ``unusable``."""
    _UNUSABLE[plugin] = why


def unusable(kind: Kind | None = None) -> list[str]:
    """What is known to be broken among the installed entry points: a line for each that was tried and failed."""
    now = {plugin for each in KINDS for plugin in installed(each)}
    return [why for plugin, why in _UNUSABLE.items() if plugin in now and kind in (None, plugin.kind)]


def why_unusable(kind: Kind, name: str) -> str:
    """The line of ``unusable`` for a name; empty if there is none."""
    same = (plugin for plugin in installed(kind) if plugin.name == name)
    return next((_UNUSABLE[plugin] for plugin in same if plugin in _UNUSABLE), "")


def warning(lines: Iterable[str]) -> str:
    """One text for lines of ``unusable`` with their number; empty if there are none."""
    listed = list(dict.fromkeys(lines))
    if not listed:
        return ""
    count = f"{len(listed)} installed plugin{'s' * (len(listed) > 1)} cannot be used"
    return "\n".join([f"warning: {count}", *(f"  {line}" for line in listed)])


def describe() -> list[dict[str, str]]:
    """Every installed entry point as a dict: ``kind``, ``name``, ``value``, ``distribution``, ``version``."""
    return [vars(plugin).copy() for kind in KINDS for plugin in installed(kind)]


def installed_packages() -> list[str]:
    """``NAME VERSION: entry points`` of each package that adds something, sorted; what ranks compare."""
    by_package: dict[str, list[str]] = {}
    for kind in KINDS:
        for plugin in installed(kind):
            by_package.setdefault(plugin.package, []).append(f"{kind} {plugin.name} = {plugin.value}")
    return [f"{package}: {', '.join(points)}" for package, points in sorted(by_package.items())]


def names_code(text: str) -> bool:
    """Whether a recipe's value is the path of an object: ``package.module:object`` or ``./file.py:object``."""
    module, colon, attribute = text.rpartition(":")
    words = [*([] if module.endswith(".py") else module.split(".")), *attribute.split(".")]
    return bool(colon and module) and all(word.isidentifier() for word in words)


def import_object(text: str, key: str) -> Any:
    """Import the object that a recipe names. This runs its code: never call it with a text from a bundle.

    Args:
        text: ``package.module:object``, or ``./file.py:object`` with the file's path from the current folder.
        key: the recipe key, for errors.

    Raises:
        PruneError: there is no such module, file or object, or its code fails.
    """
    module, _, attribute = text.rpartition(":")
    try:
        found = _module_of(module, key)
    except PruneError:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        raise PruneError(f"{key}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [other for other in vars(found) if not other.startswith("_")] if hasattr(found, "__dict__") else []
            raise PruneError(f"{key}: {module} has no {name!r}.{nearest(name, public)}")
        found = getattr(found, name)
    return found


def _module_of(module: str, key: str) -> Any:
    if not module.endswith(".py"):
        _search_in(Path.cwd())  # as plain python would
        return importlib.import_module(module)
    path = Path(module).expanduser().resolve()
    if not path.is_file():
        raise PruneError(f"{key}: there is no file {path}")
    _search_in(path.parent)  # for what the file imports from beside it
    return _file_module(path, path.stat().st_mtime_ns)


def _search_in(folder: Path) -> None:
    """Let modules of a folder be imported, after those of all other folders."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@cache
def _file_module(path: Path, written_ns: int) -> ModuleType:
    """The module of a file, by a name that no other module has; a file that was written again is read again."""
    name = f"{path.stem}_{digest(str(path))[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # its name ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle and dataclasses look it up
    spec.loader.exec_module(module)
    return module
