"""Plans that come from a file: a run's plan.json or bundle, or pruning information in the redundancy-graph authors'
form."""

from pathlib import Path

from dist_prune import documents
from dist_prune.errors import PruneError
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.saved import from_saved


def read(file: Path, channels: Channels) -> Plan:
    """The plan of a file, or of a bundle's folder, for the network that ``channels`` was traced on.

    Raises:
        PruneError: no such file, neither of the two forms, or another network's.
    """
    file = manifest_of(file)
    if not file.is_file():
        raise PruneError(f"there is no plan file {file}")
    body = documents.read_json(file)
    if not isinstance(body, dict) or not body:
        raise PruneError(f"{file} holds neither a plan nor pruning information {{layer: {{saved_idxs, mask_num}}}}")
    if "weights_digest" in body and isinstance(body.get("plan"), dict):
        body = body["plan"]
    if "removed" not in body:
        return from_saved(body, channels)
    plan = Plan.of(body)
    widths = {group.name: group.width for group in channels.groups}
    if dict(plan.widths) != widths:
        differing = sorted(name for name in plan.widths.keys() | widths if plan.widths.get(name) != widths.get(name))
        raise PruneError(f"{file} is a plan for another network: {', '.join(differing[:4])} differ in width or name")
    return plan


def manifest_of(place: Path) -> Path:
    """A file as it is; of a bundle's folder, its manifest, which has the plan and the digest of the weights."""
    return place / "bundle.json" if place.is_dir() else place
