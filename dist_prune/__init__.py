"""dist_prune: distributed structured pruning of vision networks, with one recipe for each paper.

``dist_prune.load(folder)`` loads a pruned network. ``dist_prune/run.py`` runs recipes, and the command ``dist-prune``
does everything before and after a run. Importing the package imports no torch: names are resolved at their first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_MODULES = {"load": "dist_prune.export.bundle"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'dist_prune' has no attribute {name!r}")
