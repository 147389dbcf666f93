"""Paper and needs of this package's methods, read from their source files: importing a method would load torch."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_prune.config import method_needs
from dist_prune.config.method_needs import Needs

FOLDER = Path(__file__).resolve().parents[1] / "methods"
BASE = FOLDER / "base.py"


@dataclass(frozen=True)
class Declared:
    """What a class of a method declares; None where it declares nothing and its base class counts.

    Attributes:
        bases: names of its base classes.
        paper: its citation.
        needs: what its scoring needs.
    """

    bases: tuple[str, ...]
    paper: str | None
    needs: Needs | None


def read_methods(folder: Path = FOLDER) -> dict[str, Declared]:
    """Name -> what each method of the package declares, sorted; a method is a file or a folder with a ``paper``."""
    bases = dict(_classes(BASE))
    found = {}
    for path in sorted(folder.iterdir()):
        files = sorted(path.glob("*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []
        for name, declared in (pair for file in files if file != BASE for pair in _classes(file)):
            if declared.paper is not None and not name.startswith("_"):
                found[path.stem] = Declared(declared.bases, declared.paper, _needs_of(declared, bases))
    return found


def _needs_of(declared: Declared, known: Mapping[str, Declared]) -> Needs | None:
    """The needs of a class, or of its first base class that declares any."""
    if declared.needs is not None:
        return declared.needs
    inherited = (_needs_of(known[name], known) for name in declared.bases if name in known)
    return next((needs for needs in inherited if needs is not None), None)


def _classes(file: Path) -> Iterator[tuple[str, Declared]]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        values = {
            target.id: statement.value
            for statement in node.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        bases = [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases]
        paper = ast.literal_eval(values["paper"]) if "paper" in values else None
        yield node.name, Declared(tuple(bases), paper, _needs(values["needs"]) if "needs" in values else None)


def _needs(value: ast.expr) -> Needs | None:
    """``NAME`` or ``Needs(key=constant, ...)``."""
    if isinstance(value, ast.Name):
        return getattr(method_needs, value.id, None)
    if isinstance(value, ast.Call):
        return Needs(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in value.keywords})
    return None
