"""Plans that come from a file: a run's plan.json or bundle, or pruning information in the redundancy-graph authors'
form."""

from pathlib import Path

from dist_prune import safe_parsing
from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.saved_idxs import from_saved_idxs


def read_plan(file: Path, graph: DependencyGraph) -> Plan:
    """The plan of a file, or of a bundle's folder, for the network that ``graph`` was traced on.

    Raises:
        PruneError: no such file, neither of the two forms, or another network's.
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
        return from_saved_idxs(body, graph)
    plan = Plan.from_dict(body)
    widths = {group.name: group.width for group in graph.groups}
    if dict(plan.widths) != widths:
        differing = sorted(name for name in plan.widths.keys() | widths if plan.widths.get(name) != widths.get(name))
        raise PruneError(f"{file} is a plan for another network: {', '.join(differing[:4])} differ in width or name")
    return plan


def manifest_of(place: Path) -> Path:
    """A file as it is; of a bundle's folder, its manifest, which has the plan and the digest of the weights."""
    return place / "bundle.json" if place.is_dir() else place
