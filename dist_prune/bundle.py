"""A pruned network as a folder: weights, plan and what its images look like. Loading traces and unpickles nothing.

``bundle.json`` names the backbone and its arguments, the plan, the input, the classes, where it comes from, the
versions it was made with, the dense network's signature (every tensor's name and shape) and the figures measured;
``model.safetensors`` holds the small network's weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune import hub
from dist_prune.errors import PruneError
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.rebuild import rebuild
from dist_prune.runtime import backbones, checkpoint
from dist_prune.runtime.folding import fold_norms

FORMAT = 1
MANIFEST, WEIGHTS = "bundle.json", "model.safetensors"
MAKERS = ("timm", "torch", "dist-prune")  # whose versions a bundle tells


def manifest(
    backbone: Mapping[str, Any],
    plan: Plan,
    image: Mapping[str, Any],
    classes: tuple[str, ...],
    weights: Mapping[str, Tensor],
    figures: Mapping[str, Any],
    origin: Mapping[str, Any] | None = None,
    dense: nn.Module | None = None,
) -> str:
    """The text of ``bundle.json``.

    Args:
        backbone: ``name``, ``kwargs``, ``num_classes``, ``in_chans``.
        plan: what was cut, in dense coordinates.
        image: ``size``, ``mean``, ``std``, ``crop``, ``interpolation`` of the evaluation look.
        classes: class names, in the order of the logits.
        weights: the small network's state dict.
        figures: accuracies and costs for a reader.
        origin: recipe, method, paper, seed and data, for a reader.
        dense: the network before it was cut, with any weights: its signature lets a reader with another timm see
            whether the same name still means the same network. Default: built from ``backbone``.
    """
    dense = dense if dense is not None else _built(backbone)
    body = {
        "format": FORMAT, "backbone": dict(backbone), "plan": json.loads(plan.to_json()), "image": dict(image),
        "classes": list(classes), "figures": dict(figures), "origin": dict(origin or {}),
        "weights_digest": digest_of(weights), "versions": versions(), "signature": signature(dense),
    }  # fmt: skip
    return json.dumps(body, indent=1)


@dataclass(frozen=True)
class Bundle:
    """What a bundle's files hold: ``body`` of bundle.json, ``plan``, and the small network's ``weights``."""

    body: dict[str, Any]
    plan: Plan
    weights: dict[str, Tensor]

    def dense(self) -> nn.Module:
        """The network before it was cut, with fresh weights (a bundle has none for it), in evaluation mode.

        Raises:
            PruneError: the installed timm makes another network of that name than the one the bundle was made with.
        """
        try:
            found = _built(self.body["backbone"])
        except PruneError as error:
            made = (self.body.get("versions") or {}).get("timm")
            raise PruneError(f"{error} The bundle was made with timm {made}." if made else str(error)) from error
        if self.body.get("signature") is not None:  # bundles of older versions have none
            _same(self.body, found)
        return found.eval()

    def small(self) -> nn.Module:
        """The pruned network with its weights, in evaluation mode."""
        return rebuild(self.dense(), self.plan, self.weights).eval()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        size = self.body["image"]["size"]
        return self.body["backbone"]["in_chans"], size, size


def load(folder_or_hub_id: str | Path, *, fold: bool = False) -> nn.Module:
    """The pruned network of an export folder, in evaluation mode, with its weights.

    Args:
        folder_or_hub_id: a run's ``export`` folder, or ``owner/name`` of a Hugging Face repository.
        fold: batch norms are folded into the convolutions before them. The same answers to float rounding, faster;
            to serve it, not to train it on.

    Raises:
        PruneError: no bundle there, a format this version does not read, files that were altered or cut short, or a
            network that answers otherwise once folded.
    """
    found = read(folder_or_hub_id)
    return folded(found.small(), found.shape) if fold else found.small()


def _built(backbone: Mapping[str, Any]) -> nn.Module:
    spec = backbone
    return backbones.create(spec["name"], spec["num_classes"], spec["in_chans"], False, spec["kwargs"])


def versions() -> dict[str, str]:
    """Package -> installed version, of those that decide what a backbone's name means."""
    found = {}
    for name in MAKERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            found[name] = "unknown"
    return found


def signature(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of every parameter and buffer that is saved."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _same(body: Mapping[str, Any], built: nn.Module) -> None:
    """PruneError where a bundle's dense network is not the one that was just built by the same name."""
    then, now = body["signature"], signature(built)
    other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not other:
        return
    made, here = body.get("versions") or {}, versions()
    changed = [f"{name} {made[name]} there, {here[name]} here" for name in made if made[name] != here.get(name)]
    shown = "; ".join(f"{name}: {then.get(name, 'absent')} there, {now.get(name, 'absent')} here" for name in other[:3])
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    raise PruneError(
        f"{body['backbone']['name']} is another network here than where this bundle was made ({len(other)} tensors "
        f"differ: {shown}{more}). Versions: {', '.join(changed) or 'the same, so the backbone was changed by hand'}. "
        f"Install the bundle's: pip install {' '.join(f'{n}=={made[n]}' for n in ('timm', 'torch') if n in made)}"
    )


def folded(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """The same network, its batch norms folded (see ``fold_norms``); watched on two images of noise."""
    fold_norms(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    return model


def read(folder_or_hub_id: str | Path) -> Bundle:
    """The files of a bundle, checked against one another; see ``load``."""
    place = Path(folder_or_hub_id)
    if not place.exists() and hub.is_name(str(folder_or_hub_id)):
        place = hub.fetch(str(folder_or_hub_id), (MANIFEST, WEIGHTS))
    if (place / "export" / MANIFEST).is_file():  # a run directory
        place = place / "export"
    if not (place / MANIFEST).is_file() or not (place / WEIGHTS).is_file():
        raise PruneError(f"{place} is no bundle: it has no {MANIFEST} and {WEIGHTS}. A run writes one to RUN/export.")
    try:
        body = json.loads((place / MANIFEST).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PruneError(f"{place / MANIFEST} is damaged: {error}") from error
    if not isinstance(body, dict):
        raise PruneError(f"{place / MANIFEST} is damaged: it holds no mapping")
    if body.get("format") != FORMAT:
        raise PruneError(f"{place}: bundle format {body.get('format')!r}; this version reads format {FORMAT}")
    weights, _ = checkpoint.read(place / WEIGHTS)
    try:
        wanted, plan = body["weights_digest"], Plan.from_json(json.dumps(body["plan"]))
        _ = [body["backbone"][key] for key in ("name", "num_classes", "in_chans", "kwargs")], body["image"]["size"]
    except (KeyError, TypeError) as error:
        raise PruneError(f"{place / MANIFEST} is damaged: {error!r}") from error
    if digest_of(weights) != wanted:
        raise PruneError(f"{place}: {WEIGHTS} is not the file that {MANIFEST} describes: it was altered or replaced")
    return Bundle(body, plan, weights)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values, in the order of the names."""
    whole = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
