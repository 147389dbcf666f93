"""Plans read from files.

A file is a run's ``plan.json``, a bundle, or pruning information in the format of the redundancy-graph authors.
"""

from collections.abc import Callable
from pathlib import Path

from dist_prune.config import safe_parsing
from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.saved_idxs import from_saved_idxs


def read_plan(file: Path, graph: DependencyGraph, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Read the plan of a file, or of a bundle's folder, for the network that ``graph`` was traced on.

    Args:
        file: a ``plan.json``, a file of ``saved_idxs``, or a bundle's folder or manifest.
        graph: dependency graph of the dense network.
        say: called with a line if layers of pruning information were matched under other names.

    Raises:
        PruneError: there is no such file, it has neither of the two formats, or the plan is for another network.
    """
    file = manifest_of(file)
    if not file.is_file():
        raise PruneError(f"there is no plan file {file}")
    body = safe_parsing.read_json(file)
    if not isinstance(body, dict) or not body:
        raise PruneError(f"{file} holds neither a plan nor pruning information {{layer: {{saved_idxs, mask_num}}}}")
    if "weights_digest" in body and isinstance(body.get("plan"), dict):
        body = body["plan"]
    if "removed" not in body:
        return from_saved_idxs(body, graph, say)
    plan = Plan.from_dict(body)
    widths = {group.name: group.width for group in graph.groups}
    if dict(plan.widths) != widths:
        differing = sorted(name for name in plan.widths.keys() | widths if plan.widths.get(name) != widths.get(name))
        raise PruneError(f"{file} is a plan for another network: {', '.join(differing[:4])} differ in width or name")
    graph.check_removable(plan.removed, plan.blocks_removed)
    return plan


def manifest_of(path: Path) -> Path:
    """Return the manifest of a bundle's folder, which holds the plan and the digest of the weights; a file as it is."""
    return path / "bundle.json" if path.is_dir() else path
