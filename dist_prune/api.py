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
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dist_prune import methods, models, tasks
from dist_prune.config.pruning import Select, Target
from dist_prune.data.sample_loader import SampleLoader
from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.export import bundle
from dist_prune.fileio import write_atomic
from dist_prune.methods.base import TRAINED, Method
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint, TracedNetwork
from dist_prune.pruning.hooks.statistics import Statistic
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.surgeon import apply_plan, prune_tensors_like
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.tasks.base import Task
from dist_prune.tasks.outputs import main_output, named_tensors
from dist_prune.training.tracking import Tracker


class Scores(dict[str, Tensor]):
    """Named tensors on the CPU that ``select`` reads, with the method that made them.

    Attributes:
        method: the method and its options.
    """

    def __init__(self, tensors: Mapping[str, Tensor], method: Method):
        super().__init__(tensors)
        self.method = method


def trace(model: nn.Module, example: Tensor | Sequence[int]) -> DependencyGraph:
    """Find the channel groups of a network, and prove each by trial cuts.

    Args:
        model: any network of convolutions, linear layers, norms and attention that torch can trace. A wrapper
            (DistributedDataParallel, torch.compile, accelerate) is looked through. The network is not changed.
        example: images (n, C, H, W) float, of which one is used, or the shape (C, H, W).

    Returns:
        The graph. ``print(graph)`` lists its groups, and why some are protected.

    Raises:
        PruneError: the network cannot be traced.
    """
    bare = unwrap(model)
    weight = next(bare.parameters(), None)
    if weight is None:
        raise PruneError(f"the {type(bare).__name__} has no parameters, so there is nothing to prune")
    if not isinstance(example, Tensor):
        example = torch.zeros(1, *example)
    if example.dim() == 3:
        example = example[None]
    with _gradients():
        graph = trace_groups(bare, example[:1].detach().clone().to(weight.device, weight.dtype))
    config = getattr(bare, "pretrained_cfg", None)
    return replace(
        graph,
        network=TracedNetwork(
            f"{type(bare).__module__}:{type(bare).__qualname__}",
            str(config.get("architecture") or "") if isinstance(config, Mapping) else "",
            {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()},
        ),
    )


def score(
    model: nn.Module,
    graph: DependencyGraph,
    method: str | Method,
    loader: Any = None,
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
        model: the network that was traced, perhaps wrapped. It has its weights, modes and gradients afterwards.
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
            dict or an object of tensors.
        **options: of the method (``dist-prune list keys METHOD``).

    Returns:
        The scores, the same on every rank.

    Raises:
        PruneError: the method or an option is unknown, the network is not the traced one or differs between ranks, the
            loader has no labels and the method needs them, or no group is left to prune.
    """
    bare, paper = unwrap(model), _method(method, options)
    weight = next(bare.parameters())
    comm = Communicator.of(group, weight.device)
    comm.connect(1800)
    _check_same_network(bare, graph, comm)
    learned = tasks.build({"name": task}) if isinstance(task, str) else task
    learned.check_method(type(paper).__module__.split(".")[2], paper.needs)
    ranked = paper.prunable(graph.protect(learned.protect(graph.producers)))
    if not ranked.free:
        why = "; ".join(f"{group.name}: {group.protected}" for group in ranked.groups[:5])
        raise PruneError(f"no channel group is free to be pruned: {why}")
    blank = [(torch.zeros(1, *graph.example), torch.zeros(1, dtype=torch.int64))]
    samples = SampleLoader(blank if loader is None else loader, comm, weight.device, weight.dtype, learned.targets)
    ids = samples.ids
    if images is not None:
        ids = ids[calibration_ids(ids, images, seed)]
    context = _Context(
        bare, ranked, cast(Any, samples), ids, DistributedEnvironment(weight.device, comm),
        Tracker(verbose and comm.is_main), micro_batch, seed, task=learned,
    )  # fmt: skip
    context.has_images = loader is not None
    with _gradients():
        return Scores(paper.score(context), paper)


def select(
    scores: Scores,
    graph: DependencyGraph,
    *,
    target: Mapping[str, float] | None = None,
    seed: int = 0,
    **select: Any,
) -> Plan:
    """Choose the channels that go.

    Args:
        scores: of ``score``.
        graph: of ``trace``.
        target: share of one cost of the dense network that is kept: ``{"macs": 0.5}``, ``{"params": 0.4}``,
            ``{"channels": 0.6}`` or another counted cost. A latency target needs a run: ``target.latency`` in a recipe.
        seed: decides among channels that are worth the same.
        **select: keys of a recipe's ``select`` section: ``keep_ratio``, ``threshold``, ``counts``, ``scope``,
            ``min_channels``, ``round_to``, ``max_ratio``, ``keep_ratios``, ``include``, ``exclude``.

    Returns:
        The plan: what goes, by name. It is pure data (``plan.to_json()``) and the same on every rank.

    Raises:
        PruneError: a key is unknown or its value is not allowed, or the target cannot be reached.
    """
    if not isinstance(scores, Scores):
        raise PruneError("scores is no result of dist_prune.score: a plan needs to know the method that made them")
    try:
        section = Select.model_validate(dict(select))
        asked = Target.model_validate(dict(target or {})).asked()
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise PruneError("; ".join(lines)) from error
    values = section.model_dump(exclude={"exclude", "plan"})
    request = SelectionRequest(**values, target=asked, seed=seed)
    if section.plan is not None:
        raise PruneError("plan: a plan from a file is read by Plan.from_json, not selected")
    if request.cost is not None and request.cost.measured:
        raise PruneError(f"target.{request.cost.name}: it has to be measured, which a run does: write a recipe")
    method = scores.method
    ready = method.prepare(method.prunable(graph), section.exclude, request)
    return replace(method.select(scores, ready, request), graph=graph)


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
    """
    return prune_(copy.deepcopy(unwrap(model)), plan, graph, scores=scores)


def prune_(
    model: nn.Module, plan: Plan, graph: DependencyGraph | None = None, *, scores: Scores | None = None
) -> nn.Module:
    """``prune`` in place: the network itself gets smaller, and is returned.

    Optimizers and averaged weights of it hold the old tensors afterwards: make new ones, or see ``carry``.
    """
    bare = unwrap(model)
    if scores is not None and scores.method.trains_weights:
        bare.load_state_dict({n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)})
    apply_plan(bare, _graph_of(plan, graph), plan)
    bare.zero_grad(set_to_none=True)
    return bare


def carry(
    optimizer: torch.optim.Optimizer,
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    graph: DependencyGraph | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of the small network with the dense one's state, cut along with the weights.

    Args:
        optimizer: of the dense network: its class, its groups and its state (momentum, moments, steps) are taken over.
        dense: the network before pruning (``prune`` leaves it whole; ``prune_`` does not).
        small: the network of ``prune(dense, plan, graph)``.
        plan: of ``select``.
        graph: of ``trace``; a plan of ``select`` knows it.

    Returns:
        A new optimizer of the same class.

    Raises:
        PruneError: the optimizer holds a tensor that is neither a single number nor shaped as its parameter, or it
            optimizes a parameter that is not of ``dense``.
    """
    before, after = unwrap(dense), dict(unwrap(small).named_parameters())
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    groups: list[dict[str, Any]] = []
    tables: dict[str, dict[str, Tensor]] = {}
    single: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        own = []
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise PruneError("the optimizer holds a parameter that is not of the dense network")
            own.append(after[name])
            for key, value in optimizer.state[parameter].items():
                if not isinstance(value, Tensor) or value.numel() == 1 != parameter.numel():
                    single.setdefault(name, {})[key] = copy.deepcopy(value)
                elif value.shape == parameter.shape:
                    tables.setdefault(key, {})[name] = value
                else:
                    raise PruneError(
                        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name}, which is "
                        f"{tuple(parameter.shape)}: it cannot be cut along"
                    )
        groups.append({**group, "params": own})
    accepted = inspect.signature(type(optimizer)).parameters
    made = type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items() if key in accepted})
    for name, values in single.items():
        made.state[after[name]].update(values)
    for key, table in tables.items():
        for name, tensor in prune_tensors_like(before, _graph_of(plan, graph), plan, table).items():
            made.state[after[name]][key] = tensor.clone()
    return made


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
        PruneError: the plan was read from a file, or the network's outputs are not those of the task.
    """
    bare, graph = unwrap(model), _graph_of(plan, None)
    if graph.network is None:
        raise PruneError("the plan's graph was not traced by dist_prune.trace, so the dense network is not known")
    weight = next(bare.parameters())
    with torch.no_grad(), evaluation_mode(bare):
        outputs = bare(torch.zeros(2, *graph.example, device=weight.device, dtype=weight.dtype))
    learned = tasks.build({"name": task}) if isinstance(task, str) else task
    logits = main_output(outputs)
    count = logits.shape[1] if isinstance(logits, Tensor) and logits.dim() > 1 else 0
    if wrong := learned.check_outputs(outputs, count, torch.zeros(2, *graph.example)):
        raise PruneError(f"task: the network {wrong}")
    shapes = {name: list(tensor.shape[1:]) for name, tensor in named_tensors(outputs, bundle.MAIN_OUTPUT)}
    described = {} if learned.is_classification else {"task": learned.description(), "outputs": shapes}
    backbone, dense = bundle.backbone_of(graph.network, logits.shape[1], graph.example[0])
    config = models.image_config(dense, graph.example[0]) if dense is not None else {}
    image = {
        "size": graph.example[1],
        "mean": list(mean if mean is not None else config.get("mean", [0.0] * graph.example[0])),
        "std": list(std if std is not None else config.get("std", [1.0] * graph.example[0])),
    }
    names = tuple(map(str, classes if classes is not None else range(logits.shape[1])))
    if len(names) != logits.shape[1]:
        raise PruneError(f"classes: {len(names)} names for {logits.shape[1]} logits")
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
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    tensor_files.save_tensors(place / bundle.WEIGHTS, weights, {"plan": plan.fingerprint})
    write_atomic(place / bundle.MANIFEST, text)
    return place


def unwrap(model: nn.Module) -> nn.Module:
    """The bare network inside DistributedDataParallel, DataParallel, torch.compile or a prepared model."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


class _Context(DistributedScoringContext):
    """A scoring context whose images may lack labels, or be absent."""

    has_images = True

    def collect(
        self,
        points: Sequence[HookPoint],
        statistic: Statistic,
        backward: bool = False,
        *,
        train_mode: bool = False,
        augment: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        """See DistributedScoringContext; PruneError without images, or without labels for gradients of the loss."""
        self._check_images()
        if backward:
            self._check_labels()
        return super().collect(points, statistic, backward, train_mode=train_mode, augment=augment)

    @property
    def labels(self) -> Tensor:
        self._check_images()
        self._check_labels()
        return super().labels

    def _check_images(self) -> None:
        if not self.has_images:
            raise PruneError("this method looks at calibration images: give dist_prune.score a loader")

    def _check_labels(self) -> None:
        first = next(self.loader.batches([self.ids[:1]]))
        if first.labels.dim() == 1 and not first.labels.is_floating_point() and int(first.labels[0]) < 0:
            raise PruneError("this method needs labels, and the loader gives images alone: give (images, labels)")


def _graph_of(plan: Plan, graph: DependencyGraph | None) -> DependencyGraph:
    found = graph or plan.graph
    if found is None:
        raise PruneError(
            "a plan from a file does not know its network: give the graph of dist_prune.trace(model, example) as well"
        )
    return found


def _method(method: str | Method, options: Mapping[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise PruneError(f"{', '.join(options)}: a method object has its options already")
        return method
    try:
        return methods.build({**options, "name": method})
    except ValidationError as error:
        lines = (f"{method}.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise PruneError("; ".join(lines)) from error


def _check_same_network(model: nn.Module, graph: DependencyGraph, comm: Communicator) -> None:
    """PruneError unless the network has the graph's layers, and the same weights on every rank."""
    modules = dict(model.named_modules())
    for name, layer in graph.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        width = layer.width_in if layer.transposed else layer.width_out
        if layer.kind in ("conv", "linear") and (weight is None or len(weight) != width):
            raise PruneError(
                f"the graph was traced on another network: {name} is not there with {layer.width_out} outputs"
            )
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if len(set(comm.all_gather_object(whole.hexdigest()))) != 1:
        raise PruneError(
            "the network has other weights on other ranks, so there is no one plan: load the same checkpoint on every "
            "rank, or broadcast the first rank's weights"
        )


@contextmanager
def _gradients() -> Iterator[None]:
    """Tracing and scoring may need gradients, also when called in ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
