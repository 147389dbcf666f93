"""dist_prune: distributed structured pruning of vision networks, one recipe a paper.

The library is ``trace``, ``score``, ``select``, ``prune``, ``carry`` and ``load`` (see ``dist_prune.api``). Recipes run by
``dist_prune/run.py``. Importing the package imports no torch: names are resolved when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_HOME = {
    **dict.fromkeys(("trace", "score", "select", "prune", "prune_", "carry", "Scores"), "dist_prune.api"),
    "load": "dist_prune.export.bundle",
    "Method": "dist_prune.methods.base",
    "Statistic": "dist_prune.pruning.hooks.statistics",
    "Plan": "dist_prune.pruning.plan.plan",
    "DependencyGraph": "dist_prune.pruning.graph.groups",
    "ChannelGroup": "dist_prune.pruning.graph.groups",
    "PruneError": "dist_prune.errors",
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "ChannelGroup",
    "DependencyGraph",
    "Method",
    "Plan",
    "PruneError",
    "Scores",
    "Statistic",
    "__version__",
    "carry",
    "load",
    "prune",
    "prune_",
    "score",
    "select",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dist_prune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
