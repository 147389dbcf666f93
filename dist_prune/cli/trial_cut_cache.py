"""Outcomes of trial cuts, kept in the user's cache folder: checking the same network again does not repeat them.

They decide what ``check`` says, never what is cut: a run makes its own trial cuts.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_prune.config import safe_parsing
from dist_prune.errors import PruneError
from dist_prune.fileio import canonical, digest, user_cache, write_atomic
from dist_prune.pruning.graph.groups import Coupling, DependencyGraph
from dist_prune.pruning.surgery.verified_trace import protected_by, verify_groups

KIND = "trial-cuts-1"
PACKAGES = ("dist_prune", "timm", "torch", "torchvision")  # networks of other code may depend on more than their files
LIBRARIES = ("torch", "torchvision", "timm", "torch-pruning")


@dataclass(frozen=True)
class TrialCutCache:
    """Verifies groups as ``verify_groups`` does, or reads what it found before.

    Found again is only the same network at the same size, traced to the same groups by the same versions of all
    libraries and of this package. Networks of users' code are always verified.

    Args:
        name: Name of the backbone.
        classes: Its number of outputs.
        in_chans: Channels of the images.
        kwargs: Arguments of the network's class.
    """

    name: str
    classes: int
    in_chans: int
    kwargs: Mapping[str, Any]

    def verify(self, model: nn.Module, graph: DependencyGraph, example: Tensor) -> DependencyGraph:
        """Protect the groups that cannot be cut.

        Args:
            model: The bare network, as it is built; not changed.
            graph: Its groups as traced.
            example: (1, C, H, W) image on the network's device.

        Returns:
            The graph that ``verify_groups`` returns.
        """
        file = self._file(model, graph, example)
        reasons = _read(file, graph)
        if reasons is None:
            verified = verify_groups(model, graph, example)
            pairs = zip(graph.groups, verified.groups, strict=True)
            _write(file, {old.name: new.protected for old, new in pairs if new.protected != old.protected})
            return verified
        return protected_by(graph, reasons)

    def _file(self, model: nn.Module, graph: DependencyGraph, example: Tensor) -> Path | None:
        """Where the outcome is kept; None if the network's code is a user's."""
        modules = sorted({type(module).__module__ for module in model.modules()})
        if any(module.partition(".")[0] not in PACKAGES for module in modules):
            return None
        own = Path(__file__).parents[1]
        code = [*own.glob("pruning/**/*.py"), *own.glob("models/*.py")]
        code += [Path(str(sys.modules[module].__file__)) for module in modules]
        key = [
            [self.name, self.classes, self.in_chans, dict(self.kwargs), list(example.shape), str(example.dtype)],
            [version(library) for library in LIBRARIES],
            [[str(file), *_stamp(file)] for file in sorted(set(code))],
            [[g.name, g.width, g.unit, g.protected, *map(_described, g.couplings)] for g in graph.groups],
            list(graph.layers),
        ]
        return user_cache() / "trial_cuts" / f"{digest(canonical(key))[:32]}.json"


def _described(coupling: Coupling) -> list[Any]:
    return [coupling.layer, coupling.side, len(coupling.index)]


def _stamp(file: Path) -> Iterable[int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _read(file: Path | None, graph: DependencyGraph) -> dict[str, str] | None:
    """Group -> why it cannot be cut; None if nothing valid is kept."""
    if file is None:
        return None
    try:
        body = safe_parsing.read_json(file)
    except PruneError:  # there is none, or it is damaged
        return None
    reasons = body.get("reasons") if isinstance(body, dict) and body.get("kind") == KIND else None
    if not isinstance(reasons, dict) or not reasons.keys() <= {group.name for group in graph.groups}:
        return None
    return reasons if all(isinstance(reason, str) and reason for reason in reasons.values()) else None


def _write(file: Path | None, reasons: Mapping[str, str]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, safe_parsing.strict_json({"kind": KIND, "reasons": reasons}))
    except OSError:  # a home that is read-only or full: it is only verified again
        return
