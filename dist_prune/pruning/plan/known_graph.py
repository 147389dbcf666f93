"""The dependency graph that a plan belongs to: one that is given, or the plan's own."""

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan


def graph_of(plan: Plan, graph: DependencyGraph | None) -> DependencyGraph:
    """Find a plan's graph.

    Args:
        plan: of ``select``, or read from a file.
        graph: a graph of ``trace`` that goes before the plan's; None: the plan's.

    Raises:
        PruneError: the plan was read from a file, and no graph is given.
    """
    found = graph or plan.graph
    if found is None:
        raise PruneError(
            "a plan from a file does not know its network: give the graph of dist_prune.trace(model, example) as well"
        )
    return found
