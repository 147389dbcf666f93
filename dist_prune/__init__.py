"""dist_prune: distributed structured pruning of vision networks, with one recipe for each paper.

The library is ``trace``, ``score``, ``select``, ``search``, ``prune``, ``repair``, ``carry``, ``latency``,
``save`` and ``load``.
``dist_prune/run.py`` runs recipes, and the command ``dist-prune`` does everything before and after a run. Importing the
package imports no torch: names are resolved at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers: at run time names are resolved by __getattr__
    from dist_prune.api import carry, prune, prune_, save, score, trace
    from dist_prune.api_repair import repair
    from dist_prune.api_search import search
    from dist_prune.api_select import costs, latency, select
    from dist_prune.errors import PruneError
    from dist_prune.export.bundle import load
    from dist_prune.methods.base import Method, RankingMethod, ScoringContext
    from dist_prune.methods.scores import Scores
    from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, HookPoint
    from dist_prune.pruning.hooks.statistics import State, Statistic
    from dist_prune.pruning.plan.plan import Plan
    from dist_prune.pruning.selection.cost import Cost

__version__ = "0.1.0"
_MODULES = {
    **dict.fromkeys(("trace", "score", "prune", "prune_", "carry", "save"), "dist_prune.api"),
    **dict.fromkeys(("select", "costs", "latency"), "dist_prune.api_select"),
    "Scores": "dist_prune.methods.scores",
    "repair": "dist_prune.api_repair",
    "search": "dist_prune.api_search",
    "load": "dist_prune.export.bundle",
    **dict.fromkeys(("Method", "RankingMethod", "ScoringContext"), "dist_prune.methods.base"),
    **dict.fromkeys(("State", "Statistic"), "dist_prune.pruning.hooks.statistics"),
    "Plan": "dist_prune.pruning.plan.plan",
    "Cost": "dist_prune.pruning.selection.cost",
    **dict.fromkeys(("ChannelGroup", "DependencyGraph", "HookPoint"), "dist_prune.pruning.graph.groups"),
    "PruneError": "dist_prune.errors",
}
__all__ = [
    "ChannelGroup",
    "Cost",
    "DependencyGraph",
    "HookPoint",
    "Method",
    "Plan",
    "PruneError",
    "RankingMethod",
    "Scores",
    "ScoringContext",
    "State",
    "Statistic",
    "__version__",
    "carry",
    "costs",
    "latency",
    "load",
    "prune",
    "prune_",
    "repair",
    "save",
    "score",
    "search",
    "select",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'dist_prune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
