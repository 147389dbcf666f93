"""Which network was cut out of which, in this process: so that an optimizer finds the network its own one became."""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan


@dataclass(frozen=True)
class PerformedSurgery:
    """A cut of a dense network.

    Attributes:
        skeleton: the dense network without values (on the device ``meta``).
        names: id of a dense parameter -> its name. Valid as long as the parameter lives.
        graph: of the dense network.
        small: the network that was left; None if it is gone.
    """

    skeleton: nn.Module
    names: dict[int, str]
    graph: DependencyGraph
    small: "weakref.ref[nn.Module]"


# dense parameter -> fingerprint of a plan -> the last cut by it; entries go with their parameter
_performed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of a network whose tensors have shapes and dtypes, and no values.

    Args:
        model: the bare network; not changed.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def remember(
    names: dict[nn.Parameter, str], skeleton: nn.Module, graph: DependencyGraph, plan: Plan, small: nn.Module
) -> None:
    """Note a cut.

    Args:
        names: the dense network's parameters before the cut -> their names.
        skeleton: ``skeleton_of`` the dense network.
        graph: of the dense network.
        plan: that was cut.
        small: the network that was left.
    """
    surgery = PerformedSurgery(skeleton, {id(p): name for p, name in names.items()}, graph, weakref.ref(small))
    for parameter in names:
        _performed[parameter] = {**_of(parameter), plan.fingerprint: surgery}


def find(parameters: Iterable[nn.Parameter], plan: Plan) -> PerformedSurgery | None:
    """The last cut of the network of some parameters by a plan.

    Args:
        parameters: of the dense network.
        plan: that was cut.

    Returns:
        The cut; None if no cut by this plan had all of these parameters, or what it left is gone.
    """
    found: PerformedSurgery | None = None
    for parameter in parameters:
        surgery = _of(parameter).get(plan.fingerprint)
        if surgery is None or (found is not None and surgery is not found):
            return None
        found = surgery
    return found if found is not None and found.small() is not None else None


def _of(parameter: nn.Parameter) -> dict[str, PerformedSurgery]:
    return _performed.get(parameter) or {}
