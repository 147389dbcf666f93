"""The layers that repair changes: where their inputs and outputs are, and how their weights and biases change."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.module_calls import first_input
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.repair.regression_rows import table_sizes

MOST_COLUMNS = 2304  # inputs of one output that are solved for at once


@dataclass(frozen=True)
class RepairedLayer:
    """One convolution or linear layer of the pruned network.

    Attributes:
        name: module path.
        kept: (o,) int64 outputs of the dense layer that are left; None: all.
        norm: module path of the batch norm that reads the layer's outputs alone, or empty.
    """

    name: str
    kept: Tensor | None
    norm: str

    def has_intercept(self, small: nn.Module) -> bool:
        """Whether there is a place for a bias: the layer's own, or the running mean of the batch norm behind it."""
        return small.get_submodule(self.name).bias is not None or bool(self.norm)

    def kept_outputs(self, dense: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What computes the dense layer's outputs that are left, from its input; None: all are left."""
        if self.kept is None:
            return None
        module: Any = dense.get_submodule(self.name)
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            kept = self.kept.to(module.weight.device)
            narrow: Any = copy.copy(module)  # shares all but the tensors that are set
            narrow._parameters = {name: t if t is None else t.detach()[kept] for name, t in module._parameters.items()}
            return narrow
        axis, left = -1 if isinstance(module, nn.Linear) else 1, self.kept
        return lambda x: module(x).index_select(axis, left.to(x.device))

    def output_scale(self, small: nn.Module) -> Tensor | None:
        """(o,) factor of the batch norm behind the layer; None without one."""
        if not self.norm:
            return None
        norm: Any = small.get_submodule(self.norm)
        factor = (norm.running_var + norm.eps).rsqrt()
        return factor if norm.weight is None else factor * norm.weight


def repaired_layers(
    small: nn.Module, graph: DependencyGraph, plan: Plan
) -> tuple[list[RepairedLayer], dict[str, list[str]]]:
    """The layers from the first one on that reads removed channels or lies behind a removed block, in running order.

    Args:
        small: the pruned network.
        graph: of the dense network.
        plan: what was removed.

    Returns:
        The layers, and those behind the first that stay as they are: reason -> module paths. They run several times, or
        are of classes that compute something else than a convolution or a product.
    """
    calls, norms, reads = _calls(small, graph, plan.blocks_removed)
    gone: dict[str, set[int]] = {}
    for name, channels in plan.removed.items():
        for coupling in graph.group(name).couplings:
            if coupling.side == "out":
                gone.setdefault(coupling.layer, set()).update(coupling.positions(channels))
            if coupling.side == "in" or graph.layers[coupling.layer].depthwise:
                reads.add(coupling.layer)
    started, out = False, []
    stay: dict[str, list[str]] = {}
    for name in calls:
        started = started or name in reads
        module, layer = small.get_submodule(name), graph.layers.get(name)
        if not started or layer is None:
            continue
        if calls[name] != 1 or not is_plain(module):
            kind = type(module).__name__
            reason = "run several times" if calls[name] != 1 else f"are of class {kind}, which computes something else"
            stay.setdefault(reason, []).append(name)
            continue
        lost = gone.get(name)
        kept = torch.tensor([i for i in range(layer.width_out) if i not in lost]) if lost else None
        out.append(RepairedLayer(name, kept, norms.get(name, "")))
    return out, stay


def stay_text(stay: Mapping[str, Sequence[str]]) -> str:
    """The layers that stay as they are, for people; empty if there are none.

    Args:
        stay: of ``repaired_layers``.
    """
    parts = [f"{len(names)} {reason} ({_few(names)})" for reason, names in stay.items()]
    return f"{sum(map(len, stay.values()))} layers stay as they are: {'; '.join(parts)}" if parts else ""


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def column_blocks(module: nn.Module) -> list[slice]:
    """The input channels whose weights are solved for at once: all, or blocks of at most ``MOST_COLUMNS`` columns."""
    groups, columns, _ = table_sizes(module)
    if groups > 1 or columns <= MOST_COLUMNS:
        return [slice(None)]
    channels: Any = columns if isinstance(module, nn.Linear) else module.in_channels
    step = max(1, MOST_COLUMNS // (columns // channels))
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes exactly a convolution or a linear layer of its weight."""
    if isinstance(module, nn.Conv2d):
        return type(module).forward is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward
    return "weight" in module._parameters and any(  # not the view of another module's weight
        isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.ConvTranspose2d, nn.Linear)
    )


def _calls(
    model: nn.Module, graph: DependencyGraph, blocks: Sequence[str]
) -> tuple[dict[str, int], dict[str, str], set[str]]:
    """What runs in a forward pass.

    Args:
        model: the pruned network.
        graph: of the dense one.
        blocks: module paths of the residual blocks that are gone.

    Returns:
        Convolutions and linear layers -> number of calls, in order; those whose output a batch norm reads -> it; and
        the first layers behind a block that is gone.
    """
    calls: dict[str, int] = {}
    passed: list[str] = []  # blocks that are gone, since the last layer
    behind: set[str] = set()
    norms: dict[str, str] = {}
    made: dict[int, tuple[str, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):

            def after(_module: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                if passed:
                    behind.add(name)
                    passed.clear()
                made[id(output)] = name, output  # held, so that its id stays its own

            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:

            def before(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                maker = made.get(id(first_input(args, kwargs)))
                if maker is not None:
                    norms[maker[0]] = name

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    for path in blocks:
        note = lambda *_, path=path: passed.append(path)  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_pre_hook(note))
    weight = next(model.parameters())
    try:
        with evaluation_mode(model), torch.no_grad():
            model(torch.zeros(1, *graph.example, device=weight.device, dtype=weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return calls, norms, behind


@torch.no_grad()
def change_layer(
    small: nn.Module, layer: RepairedLayer, weight: Tensor, bias: Tensor, block: slice = slice(None)
) -> None:
    """Add a change to a layer's weight and bias, or to the running mean of the batch norm behind it.

    Args:
        small: changed in place.
        layer: one of its layers.
        weight: (g, d, o) float64.
        bias: (g, o) float64.
        block: input channels that the change is of.
    """
    module: Any = small.get_submodule(layer.name)
    if isinstance(module, nn.ConvTranspose2d):  # (in, out / groups, kh, kw)
        part = module.weight[block] if module.groups == 1 else module.weight
        taps = part[0, 0].numel()
        change = weight.unflatten(1, (-1, taps)).permute(0, 1, 3, 2).reshape(part.shape)
    else:
        part = module.weight[:, block]
        change = weight.transpose(1, 2).reshape(part.shape)
    part.copy_(part.double() + change)
    shift = bias.reshape(-1)
    if module.bias is not None:
        module.bias.copy_(module.bias.double() + shift)
    elif layer.norm:
        mean: Any = small.get_submodule(layer.norm).running_mean
        mean.copy_(mean.double() - shift)
