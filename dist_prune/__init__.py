"""dist_prune: distributed structured pruning of vision networks, one recipe a paper.

``dist_prune.load(folder)`` gives a pruned network back; everything else starts from ``dist_prune/run.py``.
Importing the package imports no torch: names are resolved when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_HOME = {"load": "dist_prune.export.bundle"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dist_prune' has no attribute {name!r}")
