"""Verified trace: a group is free only if cutting some of its channels has the same effect as switching them off."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, Units
from dist_prune.pruning.graph.tracer import OUTPUTS, trace_dependencies
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.network_output import copy_with, shaped_output, tensors_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.surgery.activation_memory import ActivationMemory
from dist_prune.pruning.surgery.residual_blocks import with_blocks
from dist_prune.pruning.surgery.surgeon import apply_plan

Verification = Callable[[nn.Module, DependencyGraph, Tensor], DependencyGraph]
NEAR = 1e-4  # tolerance between trial cut and gated network, as a share of the largest output; right groups reach 1e-6
UNREAD = "no layer that reads its channels was found: an operation on their way cannot be followed"


def trace_groups(
    model: nn.Module,
    example: Tensor,
    protect: Sequence[str] = (),
    streams: bool = False,
    units: Units = "earlier",
    depth: bool = False,
    verify: Verification | None = None,
) -> DependencyGraph:
    """Trace a bare model and find its layers and channel groups.

    Groups that cannot be cut are returned as well, protected with the reason. Trial cuts verify the others: every free
    group that breaks the forward pass becomes a protected one.

    Args:
        model: a bare network; not changed, but with other units than the earlier ones ``call_layers`` is applied.
        example: (1, C, H, W) image of the size that the network will run on.
        protect: globs of layers whose outputs keep their width.
        streams: whether residual streams behind norms over channels and bare parameters may lose channels.
        units: which whole units are found: those of earlier versions, or those of all ``unit_forms.FORMS``.
        depth: whether residual blocks that can go as a whole are found.
        verify: gives the graph with every group protected that cannot be cut; None: ``verify_groups``.

    Returns:
        The dependency graph; the free groups are those that ``apply_plan`` can cut.

    Raises:
        PruneError: the network cannot be traced at all, or a glob matches no layer.
    """
    graph = trace_dependencies(model, example, streams, units).protect(protect)
    example = example.to(next(model.parameters()).device)
    graph = (verify or verify_groups)(model, graph, example)
    graph = with_blocks(model, graph, example) if depth else graph
    return replace(graph, memory=ActivationMemory(model, graph))


def shapes_of(output: Any) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors of a network's output, in order."""
    return [tuple(tensor.shape) for tensor in tensors_of(output)]


def verify_groups(model: nn.Module, graph: DependencyGraph, example: Tensor) -> DependencyGraph:
    """Return a copy of the graph with every group protected whose trial cut fails, with the failure as its reason.

    The first channel, the last one and a random half of every free group are cut out of copies of the network. A copy
    has to give the outputs of the network with these channels switched off at their consumers. (Running without an
    error is not enough: an operation that moves channels by their position runs at every width.) Constant parameters
    (zero or one at initialisation) are perturbed first, because a batch norm that starts at zero hides the whole branch
    before it. If a network has other outputs in training mode, its copies have to run in that mode as well. Groups are
    tested one by one only if the test of all together fails.

    Args:
        model: a bare network; not changed.
        graph: its groups as traced, not verified.
        example: (1, C, H, W) image on the network's device.
    """
    trial = _Trial(_perturb_constants(model), graph, example)
    outputs = [group for group in graph.groups if group.protected == OUTPUTS]
    reasons = {group.name: UNREAD for group in outputs if not trial.reaches_outputs(group)}
    for choice in ("half", "first", "last"):
        free = [group for group in graph.free if group.name not in reasons]
        if trial.failure([(group, _choose(group, choice)) for group in free]):
            for group in free:
                why = trial.failure([(group, _choose(group, choice))])
                if why:
                    reasons[group.name] = f"the network without {_describe(choice)} {why}"
    return protected_by(graph, reasons)


def protected_by(graph: DependencyGraph, reasons: Mapping[str, str]) -> DependencyGraph:
    """Return a copy of the graph with some groups protected.

    Args:
        graph: not changed.
        reasons: group -> why it cannot be cut.
    """
    groups = tuple(replace(g, protected=reasons[g.name]) if g.name in reasons else g for g in graph.groups)
    return replace(graph, groups=groups)


def _describe(choice: str) -> str:
    return "half of its channels" if choice == "half" else "one of its channels"


def _choose(group: ChannelGroup, choice: str) -> tuple[int, ...]:
    """Choose the channels of a group to cut; at least one is kept."""
    if choice == "first":
        return (0,)
    if choice == "last":
        return (group.width - 1,)
    order = torch.randperm(group.width, generator=seeded_generator(0, "trial cut", group.name))
    return tuple(sorted(order[: group.width // 2].tolist()))


class _Trial:
    """Compares a network without some channels with the same network when these channels are switched off."""

    def __init__(self, model: nn.Module, graph: DependencyGraph, example: Tensor):
        self.model = model
        self.graph = graph
        self.example = example
        self.widths = {group.name: group.width for group in graph.groups}
        self.shapes = shapes_of(shaped_output(model, example))
        if self.shapes and all(0 in shape for shape in self.shapes):
            raise PruneError(
                "all outputs of the network are empty for the example image (no detections?), so trial cuts cannot be "
                "compared: give an example in which it finds something, or a network that returns its maps"
            )
        self.training_shapes = self._shapes_in_training(model)
        if self.training_shapes == self.shapes:
            self.training_shapes = None  # training mode needs no test of its own

    def cut(self, off: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """Make a copy without the channels, which shares the weights that it keeps whole."""
        small = copy_with(self.model, lambda tensor: tensor)
        apply_plan(small, self.graph, Plan(dict(off), self.widths))
        return small

    def failure(self, chosen: Sequence[tuple[ChannelGroup, tuple[int, ...]]]) -> str:
        """Say what is wrong with the network without the chosen channels; empty if nothing is."""
        off = {group.name: channels for group, channels in chosen}
        try:
            small = self.cut(off)
            with evaluation_mode(small), evaluation_mode(self.model), torch.no_grad():
                outputs = list(tensors_of(small(self.example)))
                with gate_off(self.model, self.graph, off):
                    expected = list(tensors_of(self.model(self.example)))
        except Exception as error:  # any error of the network's own forward
            return f"does not run: {type(error).__name__}: {_first_line(error)}"
        if [tuple(t.shape) for t in outputs] != [tuple(t.shape) for t in expected]:
            return "has outputs of other shapes: they are, or run into, outputs of the network"
        if any(_differ(output, other) for output, other in zip(outputs, expected, strict=True)):
            return "has other outputs than with channels switched off: they are mixed or moved on their way"
        if self.training_shapes is not None and self._shapes_in_training(small) != self.training_shapes:
            return "does not run, or has other outputs, in training mode: a head used in training only reads them"
        return ""

    def reaches_outputs(self, group: ChannelGroup) -> bool:
        """Whether cutting one of its channels changes the shape of an output."""
        try:
            return shapes_of(shaped_output(self.cut({group.name: (0,)}), self.example)) != self.shapes
        except Exception:  # an operation on the way needs all of them
            return False

    def _shapes_in_training(self, model: nn.Module) -> list[tuple[int, ...]] | None:
        """Return the shapes of the outputs in training mode, for one image; None if two copies of it do not run."""
        try:
            shapes = shapes_of(shaped_output(model, torch.cat([self.example, self.example]), training=True))
        except Exception:  # a norm over a single value, an argument that is given in training only
            return None
        return [(1, *shape[1:]) if shape and shape[0] == 2 else shape for shape in shapes]


def _differ(output: Tensor, expected: Tensor) -> bool:
    if not output.numel() or not output.is_floating_point() or not bool(torch.isfinite(expected).all()):
        return False  # counts and indices follow from the compared tensors; overflows cannot be compared
    return not float((output - expected).abs().max()) <= NEAR * float(expected.abs().max())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]


@torch.no_grad()
def _perturb_constants(model: nn.Module) -> nn.Module:
    """Return a copy in which no parameter or buffer is constant (zeros, ones, a small layer scale).

    Parameters that are not constant are shared with the model, and buffers are not: a forward pass may write to them.
    """
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
        if _constant(parameter) is None
    }
    model = copy.deepcopy(model, shared)
    generator = seeded_generator(0, "shaken")
    for tensor in _floats([*model.parameters(), *model.buffers()]):
        value = _constant(tensor)
        if value is None:
            continue
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        if abs(value) < 0.1:  # a zero, or a layer scale that starts near it
            tensor.copy_(noise - 0.5 if tensor.numel() > 1 else noise + 0.5)
        else:
            tensor.copy_(value * (noise + 0.5))
    return model


def _constant(tensor: Tensor) -> float | None:
    """The value of a constant tensor of floats; None of any other."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    flat = tensor.detach().flatten()
    value = float(flat[0])
    # most tensors differ among their first values, and the others of them need not be read
    return value if bool((flat[:16] == value).all()) and bool((flat == value).all()) else None


def _floats(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel())
