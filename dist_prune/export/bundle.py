"""Bundles: a pruned network as a folder of weights, plan and image format. Loading neither traces nor unpickles.

``bundle.json`` contains the backbone and its arguments, the plan, the image format, the classes, the origin, the
versions of the packages, the dense network's signature (the name and shape of every tensor) and the measured figures.
``model.safetensors`` contains the pruned network's weights.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune import models
from dist_prune.config import safe_parsing
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError, path_trouble, shown
from dist_prune.export import hub
from dist_prune.export import manifest as manifests
from dist_prune.export.fuse_bn import fuse_bn
from dist_prune.pruning.graph.called_layers import rows_of_view
from dist_prune.pruning.graph.groups import TracedNetwork
from dist_prune.pruning.network_output import logits_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.residual_blocks import check_shortcuts
from dist_prune.tasks.outputs import named_tensors

FORMAT = 1
MAIN_OUTPUT = "logits"  # name of a network's only output
MANIFEST, WEIGHTS = "bundle.json", "model.safetensors"
LARGEST_TRIED = 1024  # largest side of an image that a network is tried on when it is loaded
MOST_DENSE = 250_000_000  # values of a dense network that are built however few values the pruned one has
MOST_TIMES = 1000  # larger dense networks are built if they have at most so many times the pruned one's values
MAKERS = ("timm", "torch", "dist-prune")  # packages whose versions a bundle records


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
    task: Mapping[str, Any] | None = None,
    outputs: Mapping[str, list[int]] | None = None,
) -> str:
    """The text of ``bundle.json``.

    Args:
        backbone: ``name``, ``kwargs``, ``num_classes``, ``in_chans`` of the dense network.
        plan: The removed channels, in dense coordinates.
        image: The evaluation transform: ``size`` (side, or height and width) and optionally the other fields of
            ``manifest.Image``.
        classes: Class names in the order of the logits.
        weights: State dict of the pruned network.
        figures: Network (``dense`` ...) -> accuracies and costs, for a reader.
        origin: Recipe, method, paper, seed and data, for a reader (see ``manifest.Origin``).
        dense: The dense network with any weights. Its signature tells whether the same name means the same network in
            another version of timm. None: it is built from ``backbone``.
        dense_signature: The signature itself, instead of ``dense``.
        task: What the network learned, if it is no classification (see ``Task.description``).
        outputs: Name -> shape of each of its outputs for one image, without the batch.
    """
    if dense_signature is None:
        dense_signature = signature(dense if dense is not None else _build_dense(backbone))
    body = {
        "format": FORMAT,
        "backbone": dict(backbone),
        "plan": json.loads(plan.to_json()),
        "image": dict(image),
        "classes": list(classes),
        "figures": dict(figures),
        "origin": dict(origin or {}),
        "weights_digest": weights_digest(weights),
        "versions": versions(),
        "signature": dict(dense_signature),
        **({"task": dict(task), "outputs": dict(outputs or {})} if task else {}),
    }
    return safe_parsing.strict_json(body)


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle's files.

    Attributes:
        body: The body of bundle.json (see ``manifest.Manifest``).
        plan: The removed channels, in dense coordinates.
        weights: State dict of the pruned network.
    """

    body: dict[str, Any]
    plan: Plan
    weights: dict[str, Tensor]

    def dense(self, make: Callable[[], nn.Module] | None = None, allow: Collection[str] = ()) -> nn.Module:
        """The dense network with random weights (a bundle has none for it), in evaluation mode.

        Args:
            make: makes it, if it is no network that a library builds by name.
            allow: names ``package.module:callable`` that may be imported because a bundle names them.

        Raises:
            PruneError: The network is another one than the bundle was made with, or ``make`` is missing. A bundle never
                imports or runs what its file names.
        """
        spec = self.body["backbone"]
        name = spec["name"]
        if make is None and models.is_code(name):
            if name not in allow:
                raise PruneError(
                    f"this bundle's network is made by {name}, which is not run because a file says so. Import it and "
                    f"give it: dist_prune.load(folder, model={name.rpartition(':')[2]}); or allow its import: "
                    f"dist_prune.load(folder, allow=[{name!r}])"
                )
            make = partial(_build_dense, spec)
        try:
            dense = make() if make is not None else _build_dense(self.body["backbone"])
        except PruneError as error:
            raise _with_version(self.body, error) from error
        if self.body.get("signature") is not None:  # bundles of older versions have none
            _check_signature(self.body, dense)
        return dense.eval()

    def small(self, make: Callable[[], nn.Module] | None = None, allow: Collection[str] = ()) -> nn.Module:
        """The pruned network with its weights, in evaluation mode.

        Args:
            make: See ``dense``.
            allow: See ``dense``.

        Raises:
            PruneError: The bundle's parts do not fit one another, or see ``dense``.
        """
        dense = self.dense(make, allow)
        try:
            if self.plan.blocks_removed and max(self.shape[1:]) <= LARGEST_TRIED:
                noise = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(0))
                check_shortcuts(dense, self.plan.blocks_removed, noise)
            model = rebuild(dense, self.plan, self.weights).eval()
            if max(self.shape[1:]) <= LARGEST_TRIED:
                self._check_output_shape(model)
        except PruneError:
            raise
        except Exception as error:  # widths that each fit their layer, and not one another
            raise PruneError(f"the bundle's parts do not fit one another: {shown(str(error))[1:-1]}") from error
        return model

    @torch.no_grad()
    def _check_output_shape(self, model: nn.Module) -> None:
        """PruneError unless an image of zeros gets one logit for each class, or the outputs that the bundle names."""
        if self.body.get("outputs"):
            found = output_shapes(model, self.shape)
            if found != self.body["outputs"]:
                raise PruneError(
                    "the bundle's parts do not fit one another: the network answers "
                    f"{found}, not {self.body['outputs']}"
                )
            return
        shape, expected_shape = (
            tuple(logits_of(model(torch.zeros(1, *self.shape))).shape),
            (1, self.body["backbone"]["num_classes"]),
        )
        if shape != expected_shape:
            raise PruneError(
                f"the bundle's parts do not fit one another: the network answers {shape}, not {expected_shape}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        size = self.body["image"]["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.body["backbone"]["in_chans"], height, width


def load(
    folder_or_hub_id: str | Path,
    *,
    fold: bool = False,
    model: Callable[[], nn.Module] | None = None,
    allow: Collection[str] = (),
) -> nn.Module:
    """Load the pruned network of a bundle.

    Args:
        folder_or_hub_id: A run directory, its ``export`` folder, or ``owner/name`` of a Hugging Face repository.
        fold: Whether batch norms are folded into the convolutions before them. Outputs stay the same to float rounding
            and are computed faster. Fold a network to serve it, not to train it further.
        model: Creates the dense network (a class or a function without arguments), if no library creates it by name.
        allow: Names ``package.module:callable`` of your own networks that may be imported if the bundle names them. A
            bundle never decides by itself that code runs.

    Returns:
        The network with its weights, in evaluation mode on the CPU.

    Raises:
        PruneError: There is no bundle, its format is unknown, its files were altered or cut short, or the network gives
            other outputs once folded.

    Example:
        >>> again = dp.load(folder, model=lambda: torchvision.models.resnet18(num_classes=10))
        >>> torch.equal(again(images), small(images))
        True
    """
    bundle = read_bundle(folder_or_hub_id)
    network = bundle.small(model, allow)
    models.take_image_format(network, bundle.body["image"])
    return fuse(network, bundle.shape) if fold else network


def backbone_of(network: TracedNetwork, classes: int, in_chans: int) -> tuple[dict[str, Any], nn.Module | None]:
    """How a bundle names the dense network that was traced.

    Args:
        network: of the graph.
        classes: number of its logits.
        in_chans: channels of its images.

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


@torch.no_grad()
def output_shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, list[int]]:
    """Name -> shape of each output for an image of zeros, without the batch.

    Args:
        model: A network in evaluation mode.
        shape: (C, H, W) of an image.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
    outputs = models.tensor_view(model)(image)
    return {name: list(tensor.shape[1:]) for name, tensor in named_tensors(outputs, MAIN_OUTPUT)}


def _build_dense(backbone: Mapping[str, Any]) -> nn.Module:
    spec = backbone
    return models.create(spec["name"], spec["num_classes"], spec["in_chans"], False, spec["kwargs"])


def versions() -> dict[str, str]:
    """Package -> installed version, for the packages that decide which network a backbone's name means."""
    installed = {}
    for name in MAKERS:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            installed[name] = "unknown"
    return installed


def signature(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of every parameter and buffer that is saved."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_signature(body: Mapping[str, Any], built: nn.Module) -> None:
    """PruneError if a bundle's dense network is not the one that was just built by the same name."""
    recorded, built_signature = body["signature"], signature(built)
    differing = [name for name in {**recorded, **built_signature} if recorded.get(name) != built_signature.get(name)]
    if not differing:
        return
    made_with, installed = body.get("versions") or {}, versions()
    changed = [
        f"{name} {made_with[name]} there, {installed[name]} here"
        for name in made_with
        if made_with[name] != installed.get(name)
    ]
    examples = "; ".join(
        f"{name}: {recorded.get(name, 'absent')} there, {built_signature.get(name, 'absent')} here"
        for name in differing[:3]
    )
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise PruneError(
        f"{body['backbone']['name']} is another network here than where this bundle was made ({len(differing)} tensors "
        f"differ: {examples}{more}). Versions: "
        f"{', '.join(changed) or 'the same, so the backbone was changed by hand'}. Install the bundle's: pip install "
        + " ".join(f"{name}=={made_with[name]}" for name in ("timm", "torch") if name in made_with)
    )


def _with_version(body: Mapping[str, Any], error: PruneError) -> PruneError:
    """The same error, with the version of timm that knew the bundle's network."""
    timm_version = (body.get("versions") or {}).get("timm")
    return PruneError(f"{error} The bundle was made with timm {timm_version}." if timm_version else str(error))


def fuse(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Fold a network's batch norms in place (see ``fuse_bn``), with two images of noise.

    Args:
        model: A network in evaluation mode.
        shape: (C, H, W) of its images.

    Returns:
        The same network.

    Raises:
        PruneError: The network gives other outputs once folded.
    """
    fuse_bn(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    return model


def read_bundle(folder_or_hub_id: str | Path) -> Bundle:
    """Read the files of a bundle and check them against one another.

    Args:
        folder_or_hub_id: See ``load``.

    Raises:
        PruneError: There is no bundle, its format is unknown, or its files were altered or do not fit one another.
    """
    if trouble := path_trouble(str(folder_or_hub_id)):
        raise PruneError(f"no bundle there: {trouble}")
    folder = Path(folder_or_hub_id)
    if not folder.exists() and hub.is_hub_name(str(folder_or_hub_id)):
        folder = hub.fetch(str(folder_or_hub_id), (MANIFEST, WEIGHTS))
    if (folder / "export" / MANIFEST).is_file():  # a run directory
        folder = folder / "export"
    if not (folder / MANIFEST).is_file() or not (folder / WEIGHTS).is_file():
        raise PruneError(f"{folder} is no bundle: it has no {MANIFEST} and {WEIGHTS}. A run writes one to RUN/export.")
    body = safe_parsing.read_json(folder / MANIFEST)
    if not isinstance(body, dict):
        raise PruneError(f"{folder / MANIFEST} is damaged: it holds no mapping")
    if body.get("format") != FORMAT:
        raise PruneError(f"{folder}: bundle format {shown(body.get('format'))}; this version reads format {FORMAT}")
    manifests.check(body, str(folder / MANIFEST))
    spec = body["backbone"]
    try:
        models.check_portable(spec["name"])
        if not models.is_code(spec["name"]):
            models.check(spec["name"], spec["kwargs"])
    except PruneError as error:
        raise _with_version(body, error) from error
    plan = Plan.from_dict(body["plan"])
    weights, _ = tensor_files.read_tensors(folder / WEIGHTS)
    if weights_digest(weights) != body["weights_digest"]:
        raise PruneError(f"{folder}: {WEIGHTS} is not the file that {MANIFEST} describes: it was altered or replaced")
    check_fit(body, plan, weights, str(folder))
    return Bundle(body, plan, weights)


def check_fit(body: Mapping[str, Any], plan: Plan, weights: Mapping[str, Tensor], where: str) -> None:
    """PruneError if plan and weights do not fit the backbone; checked before anything is allocated."""
    spec = body["backbone"]
    if models.is_code(spec["name"]):
        dense = {name: tuple(sizes) for name, sizes in (body.get("signature") or {}).items()}
    else:
        dense = models.state_shapes(spec["name"], spec["num_classes"], spec["in_chans"], spec["kwargs"])
    if dense is None:
        return
    gone = tuple(f"{path}." for path in plan.blocks_removed)
    for name, width in plan.widths.items():
        sizes, kernel = dense.get(f"{name}.weight", (0,)), weights.get(f"{name}.weight")
        if _fits_transposed(sizes, width, kernel, plan.counts[name]):
            continue
        outputs = sizes[0] or rows_of_view(name, dense)
        if outputs < width or outputs % width:  # a unit is several outputs
            raise PruneError(f"{where}: this network does not fit the plan: {name!r} has width {outputs}, not {width}")
        kept_outputs = plan.counts[name] * (outputs // width)
        if kernel is not None and (not kernel.dim() or len(kernel) != kept_outputs):
            raise PruneError(
                f"{where}: {name!r} has the shape {tuple(kernel.shape)}, the plan leaves {kept_outputs} channels"
            )
    unmatched = {name for name in dense if not name.startswith(gone)} ^ weights.keys()
    if unmatched:
        raise PruneError(f"{where}: weights do not fit the network {spec['name']}: {', '.join(sorted(unmatched)[:4])}")
    for name, tensor in weights.items():
        shape, dense_shape = tuple(tensor.shape), dense[name]
        if not (tensor.is_floating_point() or tensor.dtype == torch.int64):
            raise PruneError(f"{where}: {name} holds {tensor.dtype}, which no weights or statistics are")
        if len(shape) != len(dense_shape) or any(not 1 <= a <= b for a, b in zip(shape, dense_shape, strict=True)):
            raise PruneError(
                f"{where}: {name} has the shape {shape}, which is no part of the dense network's {dense_shape}"
            )
    dense_values = sum(map(math.prod, dense.values()))
    pruned_values = sum(tensor.numel() for tensor in weights.values())
    if dense_values > MOST_DENSE and dense_values > MOST_TIMES * pruned_values:
        raise PruneError(
            f"{where}: {spec['name']} has {dense_values:,} values and the weights have {pruned_values:,}: no pruning "
            "removes so much, and building the dense network would take the memory for nothing"
        )


def _fits_transposed(sizes: tuple[int, ...], width: int, kernel: Tensor | None, count: int) -> bool:
    """Whether a weight fits the plan as that of a transposed convolution, whose outputs lie on the second axis.

    ``rebuild``, which knows the layers, compares them once more.
    """
    if len(sizes) != 4 or sizes[1] != width:
        return False
    return kernel is not None and kernel.dim() == 4 and kernel.shape[1] == count


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 in hexadecimal over names, dtypes, shapes and values of tensors, in the order of the names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
