"""The library's selection: the channels that go, what a network costs, and how long it takes."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.api_checks import check_count, check_types, image_shape
from dist_prune.config.pruning import Target
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.methods.scores import Scores
from dist_prune.models.wrappers import unwrap
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import counted_costs
from dist_prune.pruning.selection.keywords import read_keywords
from dist_prune.pruning.selection.ranking import SelectionRequest, check_target
from dist_prune.scoring.library_context import check_same_network
from dist_prune.scoring.network_times import NetworkTimes, missed_time
from dist_prune.training.latency import measure_latency

REPEATS = 20  # timed passes of each network, after a warm-up


def select(
    scores: Scores,
    graph: DependencyGraph,
    *,
    target: Mapping[str, float] | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
    group: Any = None,
    **select: Any,
) -> Plan:
    """Choose the channels that go.

    Args:
        scores: of ``score``.
        graph: of ``trace``.
        target: share of one cost of the dense network that is kept: ``{"macs": 0.5}``, ``{"params": 0.4}``,
            ``{"channels": 0.6}`` or another counted cost. ``{"latency": 0.5}`` is a share of the measured time of a
            forward pass; ``latency_batch`` and ``latency_tolerance`` beside it are those of a recipe.
        seed: decides among channels that are worth the same.
        model: the network that was traced, for a latency target alone: copies of it are timed on its device.
        group: process group of torch.distributed whose ranks select together, for a latency target alone: the first
            one measures. None for all processes.
        **select: keys of a recipe's ``select`` section: ``keep_ratio``, ``threshold``, ``counts``, ``scope``,
            ``min_channels``, ``round_to``, ``max_ratio``, ``keep_ratios``, ``include``, ``exclude``, ``depth`` (whole
            residual blocks, of a graph that was traced with depth).

    Returns:
        The plan: what goes, by name. It is pure data (``plan.to_json()``) and the same on every rank.

    Raises:
        PruneError: a key is unknown or its value is not allowed, or the target cannot be reached. A latency target
            also raises it if no network whose time is reliable is within ``latency_tolerance``.

    Example:
        >>> plan = dp.select(scores, graph, target={"macs": 0.5}, round_to=8)
        >>> len(plan.kept("layer4.1.conv1")) % 8
        0
    """
    request, exclude, wanted = read_keywords(select, target, seed)
    check_types(scores=(scores, Scores), graph=(graph, DependencyGraph))
    method = scores.method
    ready = method.prepare(method.prunable(graph), exclude, request)

    def choose(graph_with_costs: DependencyGraph) -> Plan:
        check_target(graph_with_costs, request)
        return method.select(scores, graph_with_costs, request)

    if request.cost is None or not request.cost.measured:
        return replace(choose(ready), graph=graph)
    if model is None:
        raise PruneError("target.latency: times are measured, so the network is needed: select(..., model=model)")
    bare = unwrap(model)
    comm = Communicator.of(group, next(bare.parameters()).device)
    comm.connect(1800)
    check_same_network(bare, graph, comm)
    return replace(_within_time(bare, ready, request, wanted, choose, comm), graph=graph)


def _within_time(
    model: nn.Module,
    graph: DependencyGraph,
    request: SelectionRequest,
    target: Target,
    choose: Callable[[DependencyGraph], Plan],
    comm: Communicator,
) -> Plan:
    """The plan of the network whose measured time is nearest to ``target.latency``."""
    environment = DistributedEnvironment(next(model.parameters()).device, comm)
    assert target.latency is not None
    measured = NetworkTimes(
        copy.deepcopy(model).eval(), graph, request, environment, target.latency_batch, REPEATS,
        torch.get_num_threads(), lambda text: None,
    )  # fmt: skip
    times = comm.broadcast_object(comm.run_on_main(measured.of_groups))
    plan, facts = measured.search(times or {}, target.latency, target.latency_tolerance, choose)
    if reason := missed_time(facts, target.latency, target.latency_tolerance):
        raise PruneError(f"target.latency: {reason}")
    return plan


def costs(graph: DependencyGraph, plan: Plan | None = None) -> dict[str, float]:
    """Count what a network costs for one image, by the rules that targets use.

    Args:
        graph: of ``trace``.
        plan: of ``select``; None for the dense network.

    Returns:
        Name of a cost -> amount: ``macs`` (multiply-accumulates of convolutions and linear layers), ``params``,
        ``channels`` (of free groups), and every other counted cost that a target may name.

    Example:
        >>> dp.costs(graph, plan)["macs"] <= 0.5 * dp.costs(graph)["macs"]
        True
    """
    check_types(graph=(graph, DependencyGraph), **({} if plan is None else {"plan": (plan, Plan)}))
    kept = plan.counts if plan is not None else {}
    return {cost.name: cost.of(graph, kept) for cost in counted_costs()}


def latency(
    models: Mapping[str, nn.Module],
    example: Tensor | Sequence[int],
    *,
    batch: int = 1,
    repeats: int = REPEATS,
    threads: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the time of a forward pass of several networks, in turns, so that their ratio means something.

    On a busy machine all are measured again, up to three times, and the quietest round counts. Under torchrun each rank
    that calls it measures for itself: call it on one.

    Args:
        models: name -> network, perhaps wrapped, all on one device. They are timed in evaluation mode, as copies.
        example: images (n, C, H, W), or the shape (C, H, W).
        batch: number of images of a pass.
        repeats: timed passes of each network, after a warm-up.
        threads: CPU threads of a pass; None for torch's present number.

    Returns:
        Name -> ``ms`` (median, milliseconds), ``ms_best``, ``images_per_s``, ``device``, ``threads``, ``repeats``,
        ``rounds``, ``reliable`` (whether other work disturbed it), and ``why`` if it is not.

    Raises:
        PruneError: the networks are on several devices, or there is none.

    Example:
        >>> times = dp.latency({"dense": model, "small": small}, (3, 64, 64), repeats=3)
        >>> sorted(times)
        ['dense', 'small']
    """
    if not isinstance(models, Mapping):
        raise PruneError(f"models: a {type(models).__name__} is given; write names, for example {{'dense': model}}")
    for name, model in models.items():
        check_types(**{f"models[{name!r}]": (model, nn.Module)})
    for name, count in (("batch", batch), ("repeats", repeats)):
        check_count(name, count)
    check_count("threads", threads, "torch's present number")
    shape = image_shape(example)
    bare = {name: copy.deepcopy(unwrap(model)) for name, model in models.items()}
    devices = {str(next(model.parameters()).device): next(model.parameters()).device for model in bare.values()}
    if len(devices) != 1:
        raise PruneError(f"latency: the networks are on {', '.join(sorted(devices)) or 'no device'}; put all on one")
    device = next(iter(devices.values()))
    found = measure_latency(bare, shape, (batch,), repeats, device, threads or torch.get_num_threads())
    return {name: batches[str(batch)] for name, batches in found.items()}
