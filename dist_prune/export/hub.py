"""Bundles on the Hugging Face hub, and their model card. The only module that uses huggingface_hub."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_prune.config import safe_parsing
from dist_prune.errors import PruneError
from dist_prune.pruning.selection.cost import report_costs
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.training.timing_noise import DOUBTFUL, is_reliable

CARD = "README.md"


def is_hub_name(text: str) -> bool:
    """Whether a text looks like ``owner/name`` of a hub repository."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def fetch(name: str, files: Sequence[str]) -> Path:
    """Get files of a hub repository from the local cache, or download them (no other files).

    Args:
        name: ``owner/name`` of the repository.
        files: Names of its files.

    Returns:
        The folder that contains the files.

    Raises:
        PruneError: There is no such repository, no access, no network, or the repository lacks one of the files.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        paths = [Path(hf_hub_download(name, file)) for file in files]
        return paths[0].parent
    except LocalEntryNotFoundError as error:
        raise PruneError(
            f"{name!r} is no folder here, and as a hub repository it is not in the local cache and cannot be "
            f"reached: {_line(error)}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise PruneError(
            f"{name!r} is no folder here, and the hub does not hand out {' and '.join(files)} of a repository of that "
            f"name: {_line(error)}. A private one needs 'hf auth login' first."
        ) from error


def push(folder: Path, destination: str, files: Sequence[str], text: str, private: bool = False) -> str:
    """Copy a bundle and its model card to a hub repository or to a folder.

    Args:
        folder: The bundle.
        destination: ``owner/name`` on the hub, or the path of a folder (with a leading ``./`` or ``/``).
        files: Names of the files to copy.
        text: The model card.
        private: Whether a new repository is private.

    Returns:
        The address of the commit, or the folder.

    Raises:
        PruneError: The destination is a file, or the hub refuses the upload.
    """
    if not is_hub_name(destination):
        folder_path = Path(destination)
        if folder_path.exists() and not folder_path.is_dir():
            raise PruneError(f"{destination} is a file; name a folder, or owner/name of a hub repository")
        folder_path.mkdir(parents=True, exist_ok=True)
        for name in files:
            shutil.copyfile(folder / name, folder_path / name)
        (folder_path / CARD).write_text(text)
        return str(folder_path)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(destination, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, folder / name) for name in files]
        operations.append(CommitOperationAdd(CARD, text.encode()))
        commit = api.create_commit(destination, operations, commit_message="A pruned network and its plan")
    except Exception as error:  # refusals, names that the hub does not allow, whatever its HTTP library raises
        raise PruneError(
            f"{destination}: the hub refused the upload: {_line(error)}. 'hf auth login' (a token with write access) "
            "comes first; a folder of that name is written as ./" + destination
        ) from error
    return commit.commit_url


def model_card(body: Mapping[str, Any], latency: Mapping[str, Any] | None = None) -> str:
    """The model card of a bundle, in Markdown with the hub's header.

    Args:
        body: The body of ``bundle.json``.
        latency: Network -> batch -> measured times, from the run's ``report.json``; None if there is none.
    """
    spec, image = body["backbone"], body["image"]
    figures, origin = body["figures"], body.get("origin", {})
    task = body.get("task") or CLASSIFICATION.description()
    tag = {"classification": "image-classification", "segmentation": "image-segmentation"}.get(task["name"])
    header = ["---", "library_name: dist_prune", *([f"pipeline_tag: {tag}"] if tag else [])]
    header += ["tags: [structured-pruning, dist_prune]", "---"]
    lines = [f"# {spec['name']}, pruned by {origin.get('method', 'dist_prune')}", ""]
    if origin:
        lines += [
            f"Recipe `{origin['recipe']}`, seed {origin['seed']}, images `{origin['data']}`, finetuned for "
            f"{origin['finetune_epochs']} epochs. Criterion: {origin['paper']}.", "",
        ]  # fmt: skip
    dense = figures.get("dense", {})
    lines += ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    costs = [cost for cost in report_costs() if any(cost.name in network for network in figures.values())]
    primary = task["primary"]
    percent = task["titles"][primary].endswith(" %")
    figure = (task["titles"][primary].removesuffix(" %"), primary, "{:.2f} %" if percent else "{:.4g}")
    rows = (figure, *((cost.unit, cost.name, "{:,}") for cost in costs))
    for title, key, number_format in rows:
        cells = [
            number_format.format(network[key]) if network.get(key) is not None else "-" for network in figures.values()
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for batch in (latency or {}).get("dense", {}):
        cells = [_ms(latency[name][batch]) if name in latency else "-" for name in figures]  # type: ignore[index]
        timing = latency["dense"][batch]  # type: ignore[index]
        lines.append(
            f"| ms, batch {batch} ({timing['device']}, {timing['threads']} threads) | " + " | ".join(cells) + " |"
        )
    if dense.get("macs") and figures.get("finetuned", {}).get("macs"):
        share = figures["finetuned"]["macs"] / dense["macs"]
        lines += ["", f"{share:.1%} of the dense network's MACs are left."]
    height, width = (image["size"],) * 2 if isinstance(image["size"], int) else image["size"]
    lines += [
        "", "```python", "import dist_prune, torch", "", "model = dist_prune.load(\"OWNER/NAME or a folder\")",
        f"{_result(body)} = model(torch.zeros(1, {spec['in_chans']}, {height}, {width}))"
        f"  # {len(body['classes'])} classes",
        "```",
        "", f"Images: {height} x {width}, on [0, 1], mean {_numbers(image['mean'])}, standard deviation "
        f"{_numbers(image['std'])}; crop {image.get('crop', 1.0)}, {image.get('interpolation', 'bilinear')}. "
        "Classes, plan and digests are in `bundle.json`.", "",
    ]  # fmt: skip
    return "\n".join([*header, "", *lines])


def _result(body: Mapping[str, Any]) -> str:
    return "logits" if list(body.get("outputs") or ["logits"]) == ["logits"] else "outputs"


def _ms(figures: Mapping[str, Any]) -> str:
    return f"{figures['ms']:.2f}" + ("" if is_reliable(figures) else f" ({DOUBTFUL})")


def report_of(folder: Path) -> dict[str, Any] | None:
    """The measured times of the run that a bundle belongs to.

    Args:
        folder: The bundle, in its run directory.

    Returns:
        Network -> batch -> measured times; None if there is no readable report.json.
    """
    file = folder.parent / "report.json"
    try:
        body = safe_parsing.read_json(file)
        return {name: body[name]["latency"] for name in ("dense", "pruned", "finetuned")}
    except (PruneError, KeyError, TypeError):
        return None


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error)).rstrip(". ")
