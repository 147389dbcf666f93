"""The layers that repair changes: where their inputs and outputs are, and how their weights and biases change."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.module_calls import first_input
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.repair.second_moments import CHUNK

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

    def output_scale(self, small: nn.Module) -> Tensor | None:
        """(o,) factor of the batch norm behind the layer; None without one."""
        if not self.norm:
            return None
        norm: Any = small.get_submodule(self.norm)
        factor = (norm.running_var + norm.eps).rsqrt()
        return factor if norm.weight is None else factor * norm.weight


def repaired_layers(model: nn.Module, small: nn.Module, graph: DependencyGraph, plan: Plan) -> list[RepairedLayer]:
    """The layers from the first one that reads removed channels on, in the order in which they run.

    Layers that run several times, and subclasses that compute something else than a convolution or a product, stay.

    Args:
        model: the dense network.
        small: the pruned one.
        graph: of the dense network.
        plan: what was removed.
    """
    calls, norms = _calls(small, graph)
    gone: dict[str, set[int]] = {}
    reads: set[str] = set()
    for name, channels in plan.removed.items():
        for coupling in graph.group(name).couplings:
            if coupling.side == "out":
                gone.setdefault(coupling.layer, set()).update(coupling.positions(channels))
            if coupling.side == "in" or graph.layers[coupling.layer].depthwise:
                reads.add(coupling.layer)
    started, out = False, []
    for name in calls:
        started = started or name in reads
        module, layer = small.get_submodule(name), graph.layers.get(name)
        if not started or layer is None or calls[name] != 1 or not is_plain(module):
            continue
        lost = gone.get(name)
        kept = torch.tensor([i for i in range(layer.width_out) if i not in lost]) if lost else None
        out.append(RepairedLayer(name, kept, norms.get(name, "")))
    return out


def column_blocks(module: nn.Module) -> list[slice]:
    """The input channels whose weights are solved for at once: all, or blocks of at most ``MOST_COLUMNS`` columns."""
    groups, columns, _ = table_sizes(module)
    if groups > 1 or columns <= MOST_COLUMNS:
        return [slice(None)]
    channels = module.in_channels if isinstance(module, nn.Conv2d) else columns
    step = max(1, MOST_COLUMNS // (columns // channels))
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes exactly a convolution or a linear layer of its weight."""
    if isinstance(module, nn.Conv2d):
        return type(module).forward is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _calls(model: nn.Module, graph: DependencyGraph) -> tuple[dict[str, int], dict[str, str]]:
    """Convolutions and linear layers -> number of calls, in order; and those whose output a batch norm reads -> it."""
    calls: dict[str, int] = {}
    norms: dict[str, str] = {}
    made: dict[int, tuple[str, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def after(_module: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                made[id(output)] = name, output  # held, so that its id stays its own

            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:

            def before(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                maker = made.get(id(first_input(args, kwargs)))
                if maker is not None:
                    norms[maker[0]] = name

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    weight = next(model.parameters())
    try:
        with evaluation_mode(model), torch.no_grad():
            model(torch.zeros(1, *graph.example, device=weight.device, dtype=weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return calls, norms


def table_sizes(module: nn.Module, block: slice = slice(None)) -> tuple[int, int, int]:
    """Groups, inputs of one output and outputs of one group of a convolution or linear layer.

    Args:
        module: the layer.
        block: the input channels that count.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups, module.weight[0, block].numel(), module.out_channels // module.groups
    assert isinstance(module, nn.Linear)
    return 1, module.weight[0, block].numel(), module.out_features


def rows_of(
    module: nn.Module, x: Tensor, errors: Tensor, block: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of a regression: what each output reads, and its error.

    Args:
        module: a convolution or a linear layer.
        x: its input, (n, C, H, W), or (..., C) of a linear layer.
        errors: of its output's shape.
        block: input channels that are read.

    Yields:
        Pieces (g, rows, d) and (g, rows, o), float64. The pieces depend on the shapes alone.
    """
    groups, inputs, outputs = table_sizes(module)
    if not isinstance(module, nn.Conv2d):
        x = x[..., block]
        inputs = x.shape[-1]
        flat, flat_errors = x.reshape(-1, inputs), errors.reshape(-1, outputs)
        step = max(1, CHUNK // inputs)
        for start in range(0, len(flat), step):
            yield flat[None, start : start + step].double(), flat_errors[None, start : start + step].double()
        return
    positions = errors.shape[2:].numel()
    inputs = inputs // (module.in_channels // groups) * (x[:, block].shape[1] // groups)
    x = x[:, block]
    step = max(1, CHUNK // (groups * inputs * positions))
    for start in range(0, len(x), step):
        patches = _patches(module, x[start : start + step])  # (n, g d, positions)
        count = len(patches)
        wide = patches.view(count, groups, inputs, positions).permute(1, 0, 3, 2).reshape(groups, -1, inputs)
        error = errors[start : start + step].reshape(count, groups, outputs, positions)
        yield wide.double(), error.permute(1, 0, 3, 2).reshape(groups, -1, outputs).double()


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """(n, C k k, positions): the entries that each output position reads."""
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and not any(module._reversed_padding_repeated_twice):
        return x.flatten(2)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    return functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)


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
    part = module.weight[:, block]
    part.copy_(part.double() + weight.transpose(1, 2).reshape(part.shape))
    shift = bias.reshape(-1)
    if module.bias is not None:
        module.bias.copy_(module.bias.double() + shift)
    elif layer.norm:
        mean: Any = small.get_submodule(layer.norm).running_mean
        mean.copy_(mean.double() - shift)
