"""Which modules of a network are residual blocks with a plain shortcut, x + f(x), and can go as a whole.

A module is one if it passes its input on once all of its parameters are zero: then f is zero, and nothing but the
shortcut is left. A block that changes the shape, or that computes something on its shortcut, does not.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.blocks import Block
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.module_calls import first_input, with_first_input
from dist_prune.pruning.network_output import tensors_of
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.surgery.depth_surgery import remove_blocks

WEIGHTED = ("conv", "linear")  # kinds of layers without which a module is no block
NEAR = 1e-6  # difference between what a block of zeros reads and returns, as a share of the largest value


@dataclass(frozen=True)
class _Call:
    """The one call of a module in a forward pass, with a copy of what it read."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> Tensor:
        return first_input(self.args, self.kwargs)


def with_blocks(model: nn.Module, graph: DependencyGraph, example: Tensor) -> DependencyGraph:
    """The graph with the residual blocks that can go.

    Every block found was removed on trial: the network has to run without it, and to give what it gives with the
    block's output replaced by its input.

    Args:
        model: the bare network of the graph; not changed.
        graph: its verified graph.
        example: (1, C, H, W) image on the network's device; its values do not matter.
    """
    generator = seeded_generator(0, "blocks")
    image = torch.randn(example.shape, generator=generator).to(example.device, example.dtype)
    with evaluation_mode(model), torch.no_grad():
        calls = _calls(model, image)
        found = [path for path, call in calls.items() if _is_plain_residual(model.get_submodule(path), call)]
        paths = _without_chains(found, graph)
        if paths and not _same_without(model, image, paths):
            paths = [path for path in paths if _same_without(model, image, [path])]
    return replace(graph, blocks=tuple(_block(model, graph, path) for path in paths))


def check_shortcuts(model: nn.Module, paths: Iterable[str], image: Tensor) -> None:
    """Check that modules whose places are to pass on what they read are residual blocks.

    Args:
        model: the dense network, with any weights; not changed.
        paths: module paths of a plan's removed blocks.
        image: (1, C, H, W) image of other values than zero.

    Raises:
        PruneError: one of them is no residual block with a plain shortcut.
    """
    modules = dict(model.named_modules())
    with evaluation_mode(model), torch.no_grad():
        calls = _calls(model, image)
        for path in paths:
            if path not in modules:
                continue  # remove_blocks says so
            if path not in calls or not _is_plain_residual(modules[path], calls[path]):
                raise PruneError(
                    f"the plan removes {path!r} as a block, and this {type(modules[path]).__name__} is no residual "
                    "block with a plain shortcut, x + f(x), in this network"
                )


def _calls(model: nn.Module, image: Tensor) -> dict[str, _Call]:
    """Module path -> its call, of modules that could be blocks, in module order."""
    found: dict[str, _Call] = {}
    times: Counter[str] = Counter()
    handles = []
    for path, module in _private_modules(model):

        def keep(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            times[path] += 1
            x = first_input(args, kwargs) if args or kwargs else None
            if isinstance(x, Tensor):  # a block may write into what it reads
                found[path] = _Call(*with_first_input(args, kwargs, x.clone()))

        def note(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
            x = found[path].input if path in found else None
            if x is None or not isinstance(output, Tensor) or (x.shape, x.dtype) != (output.shape, output.dtype):
                found.pop(path, None)

        handles += [module.register_forward_pre_hook(keep, with_kwargs=True), module.register_forward_hook(note)]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return {path: found[path] for path, _ in _private_modules(model) if path in found and times[path] == 1}


def _private_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the modules with parts of which no part is used elsewhere in the network."""
    parts: dict[int, list[str]] = {}
    for kind in (model.named_modules(remove_duplicate=False), model.named_parameters(remove_duplicate=False)):
        for name, part in kind:
            parts.setdefault(id(part), []).append(name)
    shared = [names for names in parts.values() if len(names) > 1]
    out = []
    for path, module in model.named_modules():
        inside = f"{path}."
        apart = all(len({n == path or n.startswith(inside) for n in names}) == 1 for names in shared)
        if path and apart and next(module.children(), None) is not None:
            out.append((path, module))
    return out


def _is_plain_residual(module: nn.Module, call: _Call) -> bool:
    """Whether a module with parameters of zero passes its input on."""
    x = call.input
    if not bool(x.any()) or not any(p.numel() for p in module.parameters()):
        return False
    zero = copy.deepcopy(module)
    for parameter in zero.parameters():
        parameter.zero_()
    for norm in zero.modules():
        buffers = norm._buffers
        for key in ("running_mean", "weight", "bias") if "running_mean" in buffers else ():
            if (buffer := buffers.get(key)) is not None:  # weights of frozen norms are buffers
                buffer.zero_()
    try:
        args, kwargs = with_first_input(call.args, call.kwargs, x.clone())
        output = zero(*args, **kwargs)
    except Exception:  # a forward that divides by a weight, for one
        return False
    return float((output - x).abs().max()) <= NEAR * float(x.abs().max())


def _without_chains(found: list[str], graph: DependencyGraph) -> list[str]:
    """The blocks themselves, of modules of which some lie in others: a chain of blocks passes its input on as well."""
    weighted = [name for name, layer in graph.layers.items() if layer.kind in WEIGHTED]
    count = {path: sum(name.startswith(f"{path}.") for name in weighted) for path in found}
    found = [path for path in found if count[path]]
    chosen: list[str] = []
    for path in sorted(found, key=lambda path: path.count(".")):
        if any(path.startswith(f"{outer}.") for outer in chosen):
            continue
        inner = [other for other in found if other.startswith(f"{path}.")]
        inner = [one for one in inner if not any(one.startswith(f"{outer}.") for outer in inner)]
        if 2 * sum(count[one] for one in inner) < count[path]:
            chosen.append(path)
    return [path for path in found if path in chosen]


def _same_without(model: nn.Module, image: Tensor, paths: Iterable[str]) -> bool:
    """Whether the network runs without blocks, and as if they returned what they read."""
    small = copy.deepcopy(model)
    remove_blocks(small, paths)
    handles = []
    read: dict[str, Tensor] = {}
    for path in paths:

        def keep(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            read[path] = first_input(args, kwargs).clone()

        def pass_on(_module: nn.Module, _args: Any, _output: Any, path: str = path) -> Tensor:
            return read[path]

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(keep, with_kwargs=True), module.register_forward_hook(pass_on)]
    try:
        expected = list(tensors_of(model(image)))
    finally:
        for handle in handles:
            handle.remove()
    try:
        outputs = list(tensors_of(small(image)))
    except Exception:  # the network's own forward reads a part of the block
        return False
    if len(outputs) != len(expected):
        return False
    return all(torch.equal(output, other) for output, other in zip(outputs, expected, strict=True))


def _block(model: nn.Module, graph: DependencyGraph, path: str) -> Block:
    inside = f"{path}."
    layers = tuple(name for name in graph.layers if name.startswith(inside))
    groups = tuple(g.name for g in graph.groups if g.layers and all(name.startswith(inside) for name in g.layers))
    values = sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
    counted = sum(graph.layers[name].params(*_widths(graph, name)) for name in layers)
    kinds = sorted(
        (layer.kind, layer.kernel, layer.depthwise, layer.groups > 1) for layer in (graph.layers[n] for n in layers)
    )
    return Block(path, layers, groups, values - counted, tuple(kinds))


def _widths(graph: DependencyGraph, name: str) -> tuple[int, int]:
    return graph.layers[name].width_in, graph.layers[name].width_out
