"""Verified trace: a traced group is free only if the network without some of its channels answers as the gated one."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.graph.tracer import OUTPUTS, trace_dependencies
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.surgery.surgeon import apply_plan

NEAR = 1e-4  # of the largest output: how far a trial cut may be from the gated network; right groups reach 1e-6
UNREAD = "no layer that reads its channels was found: an operation on their way cannot be followed"


def trace_groups(model: nn.Module, example: Tensor) -> DependencyGraph:
    """Trace a bare model on ``example`` (1, C, H, W) and find its layers, channel groups and sites.

    Groups that cannot be cut are there too, with the reason. A trial cut proves the rest: every free group that
    breaks the forward pass becomes a protected one.

    Raises:
        PruneError: where the network cannot be traced at all.
    """
    graph = trace_dependencies(model, example)
    return verify_groups(model, graph, example.to(next(model.parameters()).device))


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor of a network's output, in order: of tuples, lists, mappings and data classes too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))


def shapes_of(output: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors of an output."""
    return [tuple(tensor.shape) for tensor in tensors_of(output)]


def check_logits(model: nn.Module, example: Tensor, name: str) -> None:
    """PruneError where a network's output cannot be trained or measured as a classifier's.

    Args:
        model: a bare network; not changed.
        example: (1, C, H, W) images on its device.
        name: of the backbone, for the error.
    """
    for mode in ("evaluation", "training"):
        trial = copy.deepcopy(model).train(mode == "training")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found = trial(torch.cat([example, example]))
        except Exception:  # an image size, a norm over single values: other checks say what is wrong
            continue
        if not isinstance(found, Tensor) or found.dim() != 2:
            shapes = ", ".join(str(tuple(shape)) for shape in shapes_of(found)) or "no tensor"
            raise PruneError(
                f"backbone.name: {name} gives a {type(found).__name__} with {shapes} in {mode} mode, for two images; "
                "what is trained and measured here gives one tensor, (images, classes), in both modes. Leave out of "
                "backbone.kwargs what asks for features, maps or auxiliary heads"
            )


def verify_groups(model: nn.Module, graph: DependencyGraph, example: Tensor) -> DependencyGraph:
    """The channels with every group protected that a trial cut shows to be tied wrongly, with what was seen.

    The first channel, the last one and a drawn half of every free group are cut out of copies, which have to answer as
    the network does with these channels switched off where they are consumed: an operation that moves channels by
    their place runs at every width. Parameters that are constant (zero or one at initialisation) are shaken first: a
    batch norm that begins at zero hides the whole branch before it. Where a network has outputs in training mode only,
    its copies have to run in that mode too. Groups are looked at one by one only where all together fail.

    Args:
        model: a bare network; not changed.
        example: (1, C, H, W) images on its device.
    """
    trial = _Trial(_shaken(model), graph, example)
    outputs = [group for group in graph.groups if group.protected == OUTPUTS]
    told = {group.name: UNREAD for group in outputs if not trial.reaches_outputs(group)}
    for which in ("half", "first", "last"):
        free = [group for group in graph.free if group.name not in told]
        if trial.fails([(group, _chosen(group, which)) for group in free]):
            for group in free:
                why = trial.fails([(group, _chosen(group, which))])
                if why:
                    told[group.name] = f"the network without {_words(which)} {why}"
    if not told:
        return graph
    groups = tuple(replace(g, protected=told[g.name]) if g.name in told else g for g in graph.groups)
    return replace(graph, groups=groups)


def _words(which: str) -> str:
    return "half of its channels" if which == "half" else "one of its channels"


def _chosen(group: ChannelGroup, which: str) -> tuple[int, ...]:
    """Channels of a group to cut; one stays at least."""
    if which == "first":
        return (0,)
    if which == "last":
        return (group.width - 1,)
    order = torch.randperm(group.width, generator=seeded_generator(0, "trial cut", group.name))
    return tuple(sorted(order[: group.width // 2].tolist()))


class _Trial:
    """A network whose parts all speak, and what it answers with and without some channels."""

    def __init__(self, model: nn.Module, graph: DependencyGraph, example: Tensor):
        self.model, self.graph, self.example = model, graph, example
        self.widths = {group.name: group.width for group in graph.groups}
        with evaluation_mode(model), torch.no_grad():
            self.shapes = shapes_of(model(example))
        self.training = self._training(model)
        if self.training == self.shapes:
            self.training = None  # nothing more to see in training mode

    def cut(self, off: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """A copy without the channels."""
        small = copy.deepcopy(self.model)
        apply_plan(small, self.graph, Plan(dict(off), self.widths))
        return small

    def fails(self, chosen: Sequence[tuple[ChannelGroup, tuple[int, ...]]]) -> str:
        """What is wrong with the network without the chosen channels, or nothing."""
        off = {group.name: gone for group, gone in chosen}
        try:
            small = self.cut(off)
            with evaluation_mode(small), evaluation_mode(self.model), torch.no_grad():
                found = list(tensors_of(small(self.example)))
                with gate_off(self.model, self.graph, off):
                    asked = list(tensors_of(self.model(self.example)))
        except Exception as error:  # whatever the network's own forward says
            return f"does not run: {type(error).__name__}: {_line(error)}"
        if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in asked]:
            return "has outputs of other shapes: they are, or run into, outputs of the network"
        if any(_far(one, other) for one, other in zip(found, asked, strict=True)):
            return "answers otherwise than with it switched off: its channels are mixed or moved on their way"
        if self.training is not None and self._training(small) != self.training:
            return "does not run, or has other outputs, in training mode: a head that only trains reads its channels"
        return ""

    def reaches_outputs(self, group: ChannelGroup) -> bool:
        """Whether cutting one of its channels changes the shape of an output."""
        try:
            small = self.cut({group.name: (0,)})
            with evaluation_mode(small), torch.no_grad():
                return shapes_of(small(self.example)) != self.shapes
        except Exception:  # something on the way wants all of them
            return False

    def _training(self, model: nn.Module) -> list[tuple[int, ...]] | None:
        """The shapes of the outputs in training mode, for one image; None where it does not run on two copies."""
        model = copy.deepcopy(model).train()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found = shapes_of(model(torch.cat([self.example, self.example])))
        except Exception:  # a norm over a single value, an argument that only training gives
            return None
        return [(1, *shape[1:]) if shape and shape[0] == 2 else shape for shape in found]


def _far(found: Tensor, asked: Tensor) -> bool:
    if not found.is_floating_point() or not bool(torch.isfinite(asked).all()):
        return False  # counts and indices follow from what is compared; what overflows cannot be compared
    return not float((found - asked).abs().max()) <= NEAR * float(asked.abs().max())


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]


@torch.no_grad()
def _shaken(model: nn.Module) -> nn.Module:
    """A copy in which every constant tensor (zeros, ones, a small layer scale) has values of its own."""
    model = copy.deepcopy(model)
    generator = seeded_generator(0, "shaken")
    for tensor in _floats([*model.parameters(), *model.buffers()]):
        value = float(tensor.flatten()[0])
        if not bool((tensor == value).all()):
            continue
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        if abs(value) < 0.1:  # a zero, or a layer scale that begins near it
            tensor.copy_(noise - 0.5 if tensor.numel() > 1 else noise + 0.5)
        else:
            tensor.copy_(value * (noise + 0.5))
    return model


def _floats(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel())
