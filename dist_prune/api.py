"""The library: trace, score, select, prune and save a network of your own, in five lines.

    import dist_prune as dp

    graph = dp.trace(model, example)                       # channel groups, and why some are protected
    scores = dp.score(model, graph, "taylor", loader)      # merged over all ranks
    plan = dp.select(scores, graph, target={"macs": 0.5})  # the same on every rank
    small = dp.prune(model, plan)                          # physically smaller
    dp.save(small, plan, "folder")

The functions are those of a run: the same traced graph, the same statistics, the same plans. Under torchrun every rank
calls them alike.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args, overload

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset

from dist_prune import methods, models, tasks
from dist_prune.api_checks import check_choice, check_count, check_types, image_shape
from dist_prune.config.loading import error_text
from dist_prune.data.sample_loader import SampleLoader
from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.distributed.same_plugins import check_same_plugins
from dist_prune.errors import PruneError, shown
from dist_prune.export import bundle
from dist_prune.fileio import write_atomic
from dist_prune.methods.base import TRAINED, Method
from dist_prune.methods.scores import Scores
from dist_prune.models.wrappers import unwrap, unwrap_module
from dist_prune.pruning.eval_mode import evaluation_mode, with_gradients
from dist_prune.pruning.graph.groups import DependencyGraph, TracedNetwork, Units
from dist_prune.pruning.network_output import logits_of, only_logits
from dist_prune.pruning.plan.known_graph import graph_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import performed
from dist_prune.pruning.surgery.surgeon import apply_plan, prune_tensors_like
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.block_change import block_changes
from dist_prune.scoring.library_context import (
    LibraryScoringContext,
    check_same_layers,
    check_same_network,
    share_buffers,
)
from dist_prune.tasks.base import Task
from dist_prune.tasks.outputs import named_tensors
from dist_prune.training.optimizer_state import rebuild_optimizer
from dist_prune.training.tracking import Tracker


def trace(
    model: nn.Module,
    example: Tensor | Sequence[int],
    *,
    protect: Sequence[str] = (),
    streams: bool = False,
    units: Units = "earlier",
    depth: bool = False,
) -> DependencyGraph:
    """Find the channel groups of a network, and prove each by trial cuts.

    Args:
        model: any network of convolutions, linear layers, norms and attention that torch can trace. A wrapper
            (DistributedDataParallel, torch.compile, accelerate) is looked through. The network is not changed, except
            that with other ``units`` than ``earlier`` its attention modules call their layers, with the same outputs.
        example: images (n, C, H, W) float, of which one is used, or the shape (C, H, W).
        protect: globs of layers whose outputs keep their width.
        streams: whether residual streams that run through norms over channels (layer, group and root-mean-square
            norms) and bare parameters (class tokens, position embeddings, layer scales) may lose channels.
        units: what attention loses. ``earlier``: whole heads of ViT, DeiT and Swin, as in earlier versions. ``whole``:
            whole heads of every known attention module, and pairs of gated perceptrons. ``head_width``: positions of
            queries with keys and of values with outputs, of all heads of a layer alike.
        depth: find residual blocks that may go as a whole as well, for ``select(..., depth=True)``. ``score`` then
            measures how much each block changes what it reads.

    Returns:
        The graph. ``print(graph)`` lists its groups, and why some are protected.

    Raises:
        PruneError: the network cannot be traced.

    Example:
        >>> graph = dp.trace(model, (3, 64, 64))
        >>> graph.group("layer1.0.conv1").width
        64
    """
    check_types(model=(model, nn.Module))
    check_choice("units", units, get_args(Units))
    for name, value in (("streams", streams), ("depth", depth)):
        if not isinstance(value, bool):
            raise PruneError(f"{name}: {shown(value)} is given; write True or False")
    shape = image_shape(example)
    bare = models.tensor_view(own := unwrap(model))
    weight = next(bare.parameters(), None)
    if weight is None:
        raise PruneError(f"the {type(bare).__name__} has no parameters, so there is nothing to prune")
    if not isinstance(example, Tensor):
        example = torch.zeros(1, *shape)
    if example.dim() == 3:
        example = example[None]
    with with_gradients():
        if any(parameter.is_inference() for parameter in bare.parameters()):
            bare = copy.deepcopy(bare)
        image = example[:1].detach().clone().to(weight.device, weight.dtype)
        graph = trace_groups(bare, image, protect, streams, units, depth)
    graph = graph.protect_producers(tasks.anchor_layers(graph.producers))
    config = getattr(bare, "pretrained_cfg", None)
    return replace(
        graph,
        network=TracedNetwork(
            f"{type(own).__module__}:{type(own).__qualname__}",
            str(config.get("architecture") or "") if isinstance(config, Mapping) else "",
            {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()},
        ),
    )


def score(
    model: nn.Module,
    graph: DependencyGraph,
    method: str | Method,
    loader: Iterable[Any] | Dataset[Any] | None = None,
    *,
    images: int | None = None,
    micro_batch: int = 50,
    seed: int = 0,
    verbose: bool = False,
    group: Any = None,
    task: str | Task = "classification",
    **options: Any,
) -> Scores:
    """Score the channels of a network on calibration images.

    Under torchrun, accelerate or SLURM all ranks call it with the same network. The images are shared out over the
    ranks and statistics are merged exactly, so the scores do not depend on the number of ranks.

    Args:
        model: the network that was traced, perhaps wrapped. It has its weights, modes and gradients afterwards. In
            DistributedDataParallel all ranks take the buffers of the first, as in its next forward pass.
        graph: of ``trace``.
        method: the name of a method (``dist-prune list methods``), or a ``Method`` object.
        loader: a DataLoader, a map-style Dataset, or a list of batches (images (n, C, H, W) float, labels (n,) int).
            Its transforms should not be random. A sampler may shuffle, shard or pad: each image counts once. None for
            methods that read weights alone.
        images: number of calibration images, drawn by ``seed``; None for all of them.
        micro_batch: images that go through the network together.
        seed: of everything that the method draws.
        verbose: print progress on the first rank.
        group: process group of torch.distributed whose ranks score together; None for all processes.
        task: what the network learned, a name or a ``Task`` object: its loss is the one whose gradients methods read.
            ``segmentation`` takes batches (images, masks (n, H, W) int) and networks that give one tensor, a tuple, a
            dict or an object of tensors. ``detection`` takes torchvision's batches (images, targets of each image).
        **options: of the method (``dist-prune list keys METHOD``).

    Returns:
        The scores, the same on every rank.

    Raises:
        PruneError: the method or an option is unknown, the network is not the traced one or differs between ranks, the
            loader has no labels and the method needs them, or no group is left to prune.

    Example:
        >>> scores = dp.score(model, graph, "taylor", loader)
        >>> dp.select(scores, graph, keep_ratio=0.5).counts["conv1"]
        32
    """
    check_types(model=(model, nn.Module), graph=(graph, DependencyGraph))
    check_count("images", images, "all of them")
    check_count("micro_batch", micro_batch)
    bare, paper = models.tensor_view(unwrap(model)), _method(method, options)
    weight = next(bare.parameters())
    comm = Communicator.of(group, weight.device)
    comm.connect(1800)
    check_same_plugins(comm)
    share_buffers(model, comm)
    if any(parameter.is_inference() for parameter in bare.parameters()):
        with torch.inference_mode(False):  # autograd refuses tensors that were made in inference mode; copies are plain
            bare = copy.deepcopy(bare)
    check_same_network(bare, graph, comm)
    learned = tasks.build({"name": task}) if isinstance(task, str) else task
    learned.check_method(_name_of(paper), paper.task_needs)
    ranked = paper.prunable(graph.protect_producers(learned.protect(graph.producers)))
    if not ranked.free:
        why = "; ".join(f"{group.name}: {group.protected}" for group in ranked.groups[:5])
        raise PruneError(f"no channel group is free to be pruned: {why}")
    blank = [(torch.zeros(1, *graph.example), torch.zeros(1, dtype=torch.int64))]
    samples = SampleLoader(blank if loader is None else loader, comm, weight.device, weight.dtype, learned.targets)
    ids = samples.ids
    if images is not None:
        ids = ids[calibration_ids(ids, images, seed)]
    context = LibraryScoringContext(
        bare, ranked, cast(Any, samples), ids, DistributedEnvironment(weight.device, comm),
        Tracker(verbose and comm.is_main), micro_batch, seed, task=learned,
    )  # fmt: skip
    context.has_images = loader is not None
    with with_gradients(), only_logits(bare) if learned.is_classification else nullcontext():
        changes = block_changes(context) if context.has_images else {}
        return Scores({**paper.score(context), **changes}, paper)


def prune(
    model: nn.Module, plan: Plan, graph: DependencyGraph | None = None, *, scores: Scores | None = None
) -> nn.Module:
    """A physically smaller copy of a network.

    Args:
        model: the network that was traced, perhaps wrapped. It is not changed.
        plan: of ``select``, or ``Plan.from_json``.
        graph: of ``trace``; a plan of ``select`` knows it.
        scores: needed by methods that train weights while they score (``sensitivity``): the copy starts from these.

    Returns:
        A bare copy on the same device, with fewer channels; parameters that are new tensors have no gradients.

    Raises:
        PruneError: the plan belongs to another network.

    Example:
        >>> small = dp.prune(model, plan)
        >>> small(images).shape
        torch.Size([8, 10])
    """
    bare = unwrap(model)
    return _cut(bare, copy.deepcopy(bare), plan, graph, scores)


def prune_(
    model: nn.Module, plan: Plan, graph: DependencyGraph | None = None, *, scores: Scores | None = None
) -> nn.Module:
    """``prune`` in place: the network itself gets smaller, and is returned.

    Optimizers and averaged weights of it hold the old tensors afterwards: make new ones, or see ``carry``.

    Example:
        >>> other = torchvision.models.resnet18(num_classes=10).eval()
        >>> dp.prune_(other, plan) is other
        True
    """
    bare = unwrap(model)
    return _cut(bare, bare, plan, graph, scores, unwrap_module(model))


def _cut(
    dense: nn.Module,
    target: nn.Module,
    plan: Plan,
    graph: DependencyGraph | None,
    scores: Scores | None,
    left: nn.Module | None = None,
) -> nn.Module:
    """Cut ``target``, which is ``dense`` or a copy of it, and note ``left`` (default: ``target``) for ``carry``."""
    check_types(model=(dense, nn.Module), plan=(plan, Plan))
    graph = graph_of(plan, graph)
    check_same_layers(dense, graph)
    names = {parameter: name for name, parameter in dense.named_parameters()}
    skeleton = performed.skeleton_of(dense)
    if scores is not None and scores.method.trains_weights:
        target.load_state_dict({n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)})
    apply_plan(target, graph, plan)
    target.zero_grad(set_to_none=True)
    left = target if left is None else left  # what the user holds; a view of it would be gone soon
    performed.remember(names, skeleton, graph, plan, left)
    return left


@overload
def carry(optimizer: torch.optim.Optimizer, plan: Plan, /) -> torch.optim.Optimizer: ...
@overload
def carry(
    optimizer: torch.optim.Optimizer,
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    graph: DependencyGraph | None = None,
) -> torch.optim.Optimizer: ...
def carry(
    optimizer: torch.optim.Optimizer,
    dense: nn.Module | Plan,
    small: nn.Module | None = None,
    plan: Plan | None = None,
    graph: DependencyGraph | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of the small network with the dense one's state, cut along with the weights.

    ``carry(optimizer, plan)`` after ``prune`` or ``prune_`` finds both networks itself.
    ``carry(optimizer, dense, small, plan)`` names them, for networks that were cut elsewhere.

    Args:
        optimizer: of the dense network: its class, its groups and its state (momentum, moments, steps) are taken over.
            An optimizer that accelerate has prepared gives a bare one.
        dense: the network before pruning (``prune`` leaves it whole; ``prune_`` does not), or the plan.
        small: the network of ``prune(dense, plan, graph)``.
        plan: of ``select``.
        graph: of ``trace``; a plan of ``select`` knows it.

    Returns:
        A new optimizer of the same class.

    Raises:
        PruneError: the optimizer holds a tensor that is neither a single number nor shaped as its parameter, or it
            optimizes a parameter that is not of the dense network, or that network was not cut by this plan.

    Example:
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> dp.carry(sgd, plan).defaults["momentum"]
        0.9
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner  # accelerate's
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(dense, Plan):
        surgery = performed.find(parameters, dense)
        if surgery is None or (left := surgery.small()) is None:
            raise PruneError(
                "no network of this optimizer was cut by this plan, or the small one is gone: call dist_prune.prune "
                "first and keep what it returns, or name both: carry(optimizer, dense, small, plan)"
            )
        before, after, names, graph, plan = surgery.skeleton, left, surgery.names, surgery.graph, dense
    elif small is None or plan is None:
        raise PruneError("carry takes (optimizer, plan) or (optimizer, dense, small, plan)")
    else:
        before, after, graph = unwrap(dense), unwrap(small), graph_of(plan, graph)
        names = {id(parameter): name for name, parameter in before.named_parameters()}
    if any(id(parameter) not in names for parameter in parameters):
        raise PruneError("the optimizer holds a parameter that is not of the dense network")
    shapes = {name: parameter.shape for name, parameter in before.named_parameters()}
    return rebuild_optimizer(optimizer, names, shapes, after, partial(prune_tensors_like, before, graph, plan))


def save(
    model: nn.Module,
    plan: Plan,
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    figures: Mapping[str, Any] | None = None,
    task: str | Task = "classification",
) -> Path:
    """Write a pruned network as a bundle: safetensors and JSON, nothing pickled.

    ``dist_prune.load(folder)`` reads it if the dense network is one that timm builds by name. Another one is loaded by
    ``dist_prune.load(folder, model=make)``: a bundle notes the path of the class, and never runs it.

    Args:
        model: of ``prune``, perhaps finetuned since.
        plan: of ``select``.
        folder: made if it is missing; files of an earlier bundle are replaced.
        classes: names in the order of the logits; default ``0``, ``1``, ...
        mean: of the normalisation, one number a channel; default 0, or timm's of the network.
        std: the same; default 1, or timm's of the network.
        figures: measured numbers for a reader: ``{"pruned": {"top1": 91.2}}``.
        task: what the network learned, a name or a ``Task`` object, as in ``score``.

    Returns:
        The folder.

    Raises:
        PruneError: the plan was read from a file, the network is not the one that it leaves, or its outputs are not
            those of the task.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> sorted(path.name for path in dp.save(small, plan, folder).iterdir())
        ['bundle.json', 'model.safetensors']
    """
    check_types(model=(model, nn.Module), plan=(plan, Plan))
    bare, graph = unwrap(model), graph_of(plan, None)
    if graph.network is None:
        raise PruneError("the plan's graph was not traced by dist_prune.trace, so the dense network is not known")
    weight = next(bare.parameters())
    with torch.no_grad(), evaluation_mode(bare):
        outputs = models.tensor_view(bare)(torch.zeros(2, *graph.example, device=weight.device, dtype=weight.dtype))
    learned = tasks.build({"name": task}) if isinstance(task, str) else task
    seen = logits_of(outputs) if learned.is_classification else outputs
    count = learned.count_outputs(seen)
    if wrong := learned.check_outputs(seen, count, torch.zeros(2, *graph.example)):
        raise PruneError(f"task: the network {wrong}")
    shapes = {name: list(tensor.shape[1:]) for name, tensor in named_tensors(outputs, bundle.MAIN_OUTPUT)}
    described = {} if learned.is_classification else {"task": learned.description(), "outputs": shapes}
    backbone, dense = bundle.backbone_of(graph.network, count, graph.example[0])
    config = models.image_config(dense, graph.example[0]) if dense is not None else {}
    image = {
        "size": graph.example[1] if graph.example[1] == graph.example[2] else list(graph.example[1:]),
        "mean": list(mean if mean is not None else config.get("mean", [0.0] * graph.example[0])),
        "std": list(std if std is not None else config.get("std", [1.0] * graph.example[0])),
    }
    names = tuple(map(str, classes if classes is not None else range(count)))
    if len(names) != count:
        raise PruneError(f"classes: {len(names)} names for {count} logits")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in bare.state_dict().items()}
    text = bundle.manifest_json(
        backbone,
        plan,
        image,
        names,
        weights,
        figures or {},
        dense_signature={k: list(v) for k, v in graph.network.signature.items()},
        **described,
    )
    bundle.check_fit(json.loads(text), plan, weights, "save: the network is not the one that this plan leaves")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    tensor_files.save_tensors(place / bundle.WEIGHTS, weights, {"plan": plan.fingerprint})
    write_atomic(place / bundle.MANIFEST, text)
    return place


def _method(method: str | Method, options: Mapping[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise PruneError(f"{', '.join(options)}: a method object has its options already")
        return method
    if not isinstance(method, str):
        raise PruneError(
            f"method: a {type(method).__name__} is given; write the name of a method or a Method object: "
            "score(model, graph, method, loader)"
        )
    try:
        return methods.build({**options, "name": method})
    except ValidationError as error:
        model = methods.options_of(method)
        raise PruneError("\n".join(error_text(item, model, f"{method}.") for item in error.errors())) from error


def _name_of(method: Method) -> str:
    """A method's name: that of its file in this package, or of its class elsewhere."""
    package, _, inner = type(method).__module__.partition("dist_prune.methods.")
    return inner.partition(".")[0] if inner and not package else type(method).__name__
