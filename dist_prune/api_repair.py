"""The library's repair: a pruned network gets new weights in closed form, without labels and without training.

    small = dp.prune(model, plan)
    small = dp.repair(model, small, plan, loader)

docs/repair.md has the formulas, and says when which method helps.
"""

import copy
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.data import Dataset

from dist_prune.api_checks import check_choice, check_count, check_positive, check_types
from dist_prune.data.sample_loader import SampleLoader
from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError, unknown
from dist_prune.models.wrappers import unwrap
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.known_graph import graph_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.scoring.library_context import check_same_network
from dist_prune.scoring.repair import Repairer
from dist_prune.training.tracking import Tracker

RepairMethod = Literal["norms", "bias", "fold", "least_squares"]


def repair(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    loader: Iterable[Any] | Dataset[Any],
    graph: DependencyGraph | None = None,
    *,
    method: RepairMethod | Literal["none"] = "least_squares",
    norms: Literal["plain", "refit"] = "plain",
    images: int | None = None,
    ridge: float | None = None,
    micro_batch: int = 16,
    memory_mb: int = 2048,
    seed: int = 0,
    verbose: bool = False,
    group: Any = None,
) -> nn.Module:
    """A copy of a pruned network whose layers are repaired in closed form, without labels and without training.

    Under torchrun all ranks call it alike and get the same bits, whatever their number.

    Args:
        model: the dense network (``prune`` leaves it whole; ``prune_`` does not).
        small: the network of ``prune(model, plan)``, not yet finetuned. It is not changed.
        plan: of ``select``.
        loader: images as in ``score``; labels are not read.
        graph: of ``trace``; a plan of ``select`` knows it.
        method: ``least_squares``: weights and biases of every layer from the first that reads removed channels on;
            ``bias``: biases alone; ``fold``: removed channels into the kept ones most like them; ``norms``: batch-norm
            statistics; ``none``: nothing but ``norms``.
        norms: ``refit`` first gives norms over channels that lost channels (``trace(..., streams=True)``) scales and
            shifts by least squares to their dense outputs; ``plain`` leaves them as they were cut.
        images: number of images, drawn by ``seed``; None for all of them.
        ridge: pull of ``least_squares`` towards the weights as they were cut, relative to the mean square of a layer's
            inputs; None: for each layer what does best on images that it was not fitted to.
        micro_batch: images that go through the networks together.
        memory_mb: MiB of activations that a process may hold between two layers.
        seed: draws the images.
        verbose: print cost and progress on the first rank.
        group: process group of torch.distributed whose ranks repair together; None for all processes.

    Returns:
        The repaired copy, bare, on the same device.

    Raises:
        PruneError: the plan belongs to another network, or activations overflow.

    Example:
        >>> repaired = dp.repair(model, small, plan, loader, method="bias")
        >>> repaired(images).shape
        torch.Size([8, 10])
    """
    check_types(model=(model, nn.Module), small=(small, nn.Module), plan=(plan, Plan))
    check_count("images", images, "all of them")
    check_count("micro_batch", micro_batch)
    check_count("memory_mb", memory_mb, least=0)
    check_positive("ridge", ridge, "what does best on images that a layer was not fitted to")
    check_choice("norms", norms, ("plain", "refit"))
    bare, repaired = unwrap(model), copy.deepcopy(unwrap(small))
    weight = next(bare.parameters())
    comm = Communicator.of(group, weight.device)
    comm.connect(1800)
    found = graph_of(plan, graph)
    check_same_network(bare, found, comm)
    if method not in (known := (*get_args(RepairMethod), "none")):
        raise PruneError(unknown("method of repair", str(method), known))
    samples = SampleLoader(loader, comm, weight.device, weight.dtype)
    ids = samples.ids if images is None else samples.ids[calibration_ids(samples.ids, images, seed)]
    tracker = Tracker(verbose and comm.is_main)
    repairer = Repairer(samples, ids, comm, tracker, method, ridge, micro_batch, memory_mb * 2**20)
    repairer.norms = norms
    with torch.inference_mode(False):
        repairer.run(bare, repaired, found, plan)
    return repaired
