"""dist_prune: distributed structured pruning of vision networks, with one recipe for each paper.

The library is ``trace``, ``score``, ``select``, ``prune``, ``repair``, ``carry``, ``save`` and ``load``.
``dist_prune/run.py`` runs recipes, and the command ``dist-prune`` does everything before and after a run. Importing the
package imports no torch: names are resolved at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers: at run time names are resolved by __getattr__
    from dist_prune.api import Scores, carry, prune, prune_, save, score, select, trace
    from dist_prune.api_repair import repair
    from dist_prune.errors import PruneError
    from dist_prune.export.bundle import load
    from dist_prune.methods.base import Method
    from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
    from dist_prune.pruning.hooks.statistics import Statistic
    from dist_prune.pruning.plan.plan import Plan

__version__ = "0.1.0"
_MODULES = {
    **dict.fromkeys(("trace", "score", "select", "prune", "prune_", "carry", "save", "Scores"), "dist_prune.api"),
    "repair": "dist_prune.api_repair",
    "load": "dist_prune.export.bundle",
    "Method": "dist_prune.methods.base",
    "Statistic": "dist_prune.pruning.hooks.statistics",
    "Plan": "dist_prune.pruning.plan.plan",
    "DependencyGraph": "dist_prune.pruning.graph.groups",
    "ChannelGroup": "dist_prune.pruning.graph.groups",
    "PruneError": "dist_prune.errors",
}
__all__ = [
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
    "repair",
    "save",
    "score",
    "select",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'dist_prune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
