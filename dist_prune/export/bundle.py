"""A pruned network as a folder: weights, plan and what its images look like. Loading traces and unpickles nothing.

``bundle.json`` names the backbone and its arguments, the plan, the input, the classes, where it comes from, the
versions it was made with, the dense network's signature (every tensor's name and shape) and the figures measured;
``model.safetensors`` holds the small network's weights.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune import models, safe_parsing
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError, path_trouble, shown
from dist_prune.export import hub
from dist_prune.export import manifest as manifests
from dist_prune.export.fuse_bn import fuse_bn
from dist_prune.pruning.graph.groups import TracedNetwork
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.rebuild import rebuild

FORMAT = 1
MANIFEST, WEIGHTS = "bundle.json", "model.safetensors"
LARGEST_TRIED = 1024  # side of an image that a network is tried on as it is loaded
MOST_DENSE, MOST_TIMES = 250_000_000, 1000  # values of a dense network that may be built for however little is left
MAKERS = ("timm", "torch", "dist-prune")  # whose versions a bundle tells


def manifest_json(
    backbone: Mapping[str, Any],
    plan: Plan,
    image: Mapping[str, Any],
    classes: tuple[str, ...],
    weights: Mapping[str, Tensor],
    figures: Mapping[str, Any],
    origin: Mapping[str, Any] | None = None,
    dense: nn.Module | None = None,
    dense_signature: Mapping[str, list[int]] | None = None,
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
        dense_signature: the signature itself, in the place of ``dense``.
    """
    if dense_signature is None:
        dense_signature = signature(dense if dense is not None else _built(backbone))
    body = {
        "format": FORMAT, "backbone": dict(backbone), "plan": json.loads(plan.to_json()), "image": dict(image),
        "classes": list(classes), "figures": dict(figures), "origin": dict(origin or {}),
        "weights_digest": weights_digest(weights), "versions": versions(), "signature": dict(dense_signature),
    }  # fmt: skip
    return safe_parsing.strict_json(body)


@dataclass(frozen=True)
class Bundle:
    """What a bundle's files hold: ``body`` of bundle.json, ``plan``, and the small network's ``weights``."""

    body: dict[str, Any]
    plan: Plan
    weights: dict[str, Tensor]

    def dense(self, make: Callable[[], nn.Module] | None = None) -> nn.Module:
        """The network before it was cut, with fresh weights (a bundle has none for it), in evaluation mode.

        Args:
            make: makes it, if it is no network that timm builds by name.

        Raises:
            PruneError: the network is not the one that the bundle was made with, or ``make`` is missing. A bundle never
                imports or runs what its file names.
        """
        name = self.body["backbone"]["name"]
        if make is None and is_external(name):
            raise PruneError(
                f"this bundle's network is made by {name}, which is not run because a file says so. Import it and give "
                f"it: dist_prune.load(folder, model={name.rpartition(':')[2]})"
            )
        try:
            found = make() if make is not None else _built(self.body["backbone"])
        except PruneError as error:
            raise _with_version(self.body, error) from error
        if self.body.get("signature") is not None:  # bundles of older versions have none
            _same(self.body, found)
        return found.eval()

    def small(self, make: Callable[[], nn.Module] | None = None) -> nn.Module:
        """The pruned network with its weights, in evaluation mode; ``make``: see ``dense``."""
        dense = self.dense(make)
        try:
            model = rebuild(dense, self.plan, self.weights).eval()
            if self.shape[1] <= LARGEST_TRIED:
                self._answers(model)
        except PruneError:
            raise
        except Exception as error:  # widths that each fit their layer, and not one another
            raise PruneError(f"the bundle's parts do not fit one another: {shown(str(error))[1:-1]}") from error
        return model

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> None:
        """PruneError unless an image of zeros gets one number for each class."""
        found, wanted = tuple(model(torch.zeros(1, *self.shape)).shape), (1, self.body["backbone"]["num_classes"])
        if found != wanted:
            raise PruneError(f"the bundle's parts do not fit one another: the network answers {found}, not {wanted}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        size = self.body["image"]["size"]
        return self.body["backbone"]["in_chans"], size, size


def load(
    folder_or_hub_id: str | Path, *, fold: bool = False, model: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """The pruned network of an export folder, in evaluation mode, with its weights.

    Args:
        folder_or_hub_id: a run's ``export`` folder, or ``owner/name`` of a Hugging Face repository.
        fold: batch norms are folded into the convolutions before them. The same answers to float rounding, faster;
            to serve it, not to train it on.
        model: makes the dense network (a class or a function without arguments), if timm does not build it by name.

    Raises:
        PruneError: no bundle there, a format this version does not read, files that were altered or cut short, or a
            network that answers otherwise once folded.
    """
    found = read_bundle(folder_or_hub_id)
    return fuse(found.small(model), found.shape) if fold else found.small(model)


def is_external(name: str) -> bool:
    """Whether a backbone's name is ``package.module:Name`` of a network that is not timm's."""
    return ":" in name


def backbone_of(network: TracedNetwork, classes: int, in_chans: int) -> tuple[dict[str, Any], nn.Module | None]:
    """How a bundle names the dense network that was traced.

    Args:
        network: of the graph.
        classes, in_chans: of its logits and images.

    Returns:
        ``name``, ``kwargs``, ``num_classes``, ``in_chans``, and the network as timm builds it by that name, or None if
        timm's is another one: then the name is the path of its class.
    """
    shape = {"kwargs": {}, "num_classes": classes, "in_chans": in_chans}
    if network.architecture:
        try:
            dense = models.create(network.architecture, classes, in_chans, False, {})
        except PruneError:
            dense = None
        if dense is not None and signature(dense) == {name: list(sizes) for name, sizes in network.signature.items()}:
            return {"name": network.architecture, **shape}, dense
    return {"name": network.maker, **shape}, None


def _built(backbone: Mapping[str, Any]) -> nn.Module:
    spec = backbone
    return models.create(spec["name"], spec["num_classes"], spec["in_chans"], False, spec["kwargs"])


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


def _with_version(body: Mapping[str, Any], error: PruneError) -> PruneError:
    """The same error, with the version of timm that knew the bundle's network."""
    made = (body.get("versions") or {}).get("timm")
    return PruneError(f"{error} The bundle was made with timm {made}." if made else str(error))


def fuse(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """The same network, its batch norms folded (see ``fuse_bn``); watched on two images of noise."""
    fuse_bn(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    return model


def read_bundle(folder_or_hub_id: str | Path) -> Bundle:
    """The files of a bundle, checked against one another; see ``load``."""
    if trouble := path_trouble(str(folder_or_hub_id)):
        raise PruneError(f"no bundle there: {trouble}")
    place = Path(folder_or_hub_id)
    if not place.exists() and hub.is_hub_name(str(folder_or_hub_id)):
        place = hub.fetch(str(folder_or_hub_id), (MANIFEST, WEIGHTS))
    if (place / "export" / MANIFEST).is_file():  # a run directory
        place = place / "export"
    if not (place / MANIFEST).is_file() or not (place / WEIGHTS).is_file():
        raise PruneError(f"{place} is no bundle: it has no {MANIFEST} and {WEIGHTS}. A run writes one to RUN/export.")
    body = safe_parsing.read_json(place / MANIFEST)
    if not isinstance(body, dict):
        raise PruneError(f"{place / MANIFEST} is damaged: it holds no mapping")
    if body.get("format") != FORMAT:
        raise PruneError(f"{place}: bundle format {shown(body.get('format'))}; this version reads format {FORMAT}")
    manifests.check(body, str(place / MANIFEST))
    spec = body["backbone"]
    try:
        if not is_external(spec["name"]):
            models.check(spec["name"], spec["kwargs"])
    except PruneError as error:
        raise _with_version(body, error) from error
    plan = Plan.from_dict(body["plan"])
    weights, _ = tensor_files.read_tensors(place / WEIGHTS)
    if weights_digest(weights) != body["weights_digest"]:
        raise PruneError(f"{place}: {WEIGHTS} is not the file that {MANIFEST} describes: it was altered or replaced")
    _fits(body, plan, weights, str(place))
    return Bundle(body, plan, weights)


def _fits(body: Mapping[str, Any], plan: Plan, weights: Mapping[str, Tensor], where: str) -> None:
    """PruneError where plan and weights are not those of this backbone, cut; before any of it is allocated."""
    spec = body["backbone"]
    if is_external(spec["name"]):
        dense = {name: tuple(sizes) for name, sizes in (body.get("signature") or {}).items()}
    else:
        dense = models.state_shapes(spec["name"], spec["num_classes"], spec["in_chans"], spec["kwargs"])
    if dense is None:
        return
    for name, width in plan.widths.items():
        found = dense.get(f"{name}.weight", (0,))[0]
        if found < width or found % width:  # a unit is several outputs
            raise PruneError(f"{where}: this network does not fit the plan: {name!r} has width {found}, not {width}")
        left, here = plan.counts[name] * (found // width), weights.get(f"{name}.weight")
        if here is not None and (not here.dim() or len(here) != left):
            raise PruneError(f"{where}: {name!r} has the shape {tuple(here.shape)}, the plan leaves {left} channels")
    wrong = dense.keys() ^ weights.keys()
    if wrong:
        raise PruneError(f"{where}: weights do not fit the network {spec['name']}: {', '.join(sorted(wrong)[:4])}")
    for name, tensor in weights.items():
        shape, whole = tuple(tensor.shape), dense[name]
        if not (tensor.is_floating_point() or tensor.dtype == torch.int64):
            raise PruneError(f"{where}: {name} holds {tensor.dtype}, which no weights or statistics are")
        if len(shape) != len(whole) or any(not 1 <= a <= b for a, b in zip(shape, whole, strict=True)):
            raise PruneError(f"{where}: {name} has the shape {shape}, which is no part of the dense network's {whole}")
    values = sum(map(math.prod, dense.values()))
    small = sum(tensor.numel() for tensor in weights.values())
    if values > MOST_DENSE and values > MOST_TIMES * small:
        raise PruneError(
            f"{where}: {spec['name']} has {values:,} values and the weights have {small:,}: nobody prunes so much, and "
            "building the dense network would take the memory for nothing"
        )


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values, in the order of the names."""
    whole = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
