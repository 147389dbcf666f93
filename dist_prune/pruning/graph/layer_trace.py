"""Sizes of layers from one forward pass, as costs need them."""

import traceback
from collections.abc import Container
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import Layer
from dist_prune.pruning.graph.window import Window
from dist_prune.pruning.module_calls import first_input
from dist_prune.pruning.network_output import unchanged
from dist_prune.pruning.shape_mode import ShapeMode

# thop 0.1.1 looks layers up by their exact class, and only if they have no children.
_THOP_CONV = {nn.Conv1d, nn.Conv2d, nn.Conv3d}
_THOP_NORM = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
_AVERAGE = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
DESCRIBED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.modules.batchnorm._BatchNorm, *_AVERAGE)


def trace_layers(model: nn.Module, example: Tensor) -> dict[str, Layer]:
    """Run a network once and describe every conv, linear, batch norm and average pool that runs.

    Args:
        model: the bare network, in any mode; not changed.
        example: (1, C, H, W) images on the network's device.

    Returns:
        Module path -> layer, in module order.
    """
    seen: dict[str, Layer] = {}
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, DESCRIBED):
            continue  # containers may be called in any way, also by keyword only

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            layer = _describe(name, module, first_input(args, kwargs), output)
            if layer is not None and name in seen:  # a second call: the same weights are multiplied twice
                before = seen[name]
                more = 0.0 if layer.kind in ("conv", "linear") else before.thop
                layer = replace(
                    layer,
                    positions=layer.positions + before.positions,
                    places=layer.places + before.places,
                    thop=layer.thop + more,
                )
            if layer is not None:
                seen[name] = layer

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with evaluation_mode(model), torch.no_grad():
            try:
                with unchanged(model), ShapeMode():
                    model(torch.full_like(example, torch.nan))
            except Exception:  # also one that a pass with values raises as well
                seen.clear()
                model(example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name, _ in model.named_modules() if name in seen}


def where_tracing_stopped(error: BaseException, layers: Container[str]) -> str:
    """Say where a tracer stopped: after the nearest layer before the failing operation. Empty if unknown.

    The traceback's innermost frame with a node of the tracer's graph (``module``, ``inputs``) tells the operation.

    Args:
        error: the tracer's error, with its traceback.
        layers: names of the network's layers.
    """
    last: list[Any] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        nodes = [v for v in frame.f_locals.values() if hasattr(v, "inputs") and hasattr(v, "module")]
        last = nodes or last
    seen, waiting = set(), list(last[:1])
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        name = str(node.name).split(" (")[0]
        if name in layers:
            return f" after {name}"
        waiting += node.inputs
    return ""


def _describe(name: str, module: nn.Module, x: Any, y: Any) -> Layer | None:
    if isinstance(module, nn.Conv2d):
        bias = int(module.bias is not None) + int(getattr(module, "gain", None) is not None)
        kernel, positions = module.weight[0, 0].numel(), y.shape[2:].numel()
        known = float(type(module) in _THOP_CONV)
        return Layer(
            name, "conv", module.in_channels, module.out_channels, module.groups, kernel, positions, bias, known,
            window=_window(module, x, y),
        )  # fmt: skip
    if isinstance(module, nn.ConvTranspose2d):  # each input position is multiplied by the whole kernel
        bias, kernel = int(module.bias is not None), module.weight[0, 0].numel()
        positions, places = x.shape[2:].numel(), y.shape[2:].numel()
        known = places / positions if type(module) is nn.ConvTranspose2d else 0.0  # thop multiplies by outputs
        return Layer(
            name, "conv", module.in_channels, module.out_channels, module.groups, kernel, positions, bias, known,
            transposed=True, places=places, window=_window(module, x, y),
        )  # fmt: skip
    if isinstance(module, nn.Linear):
        tokens, bias = y.numel() // y.shape[0] // module.out_features, int(module.bias is not None)
        known = float(type(module) is nn.Linear)
        return Layer(name, "linear", module.in_features, module.out_features, 1, 1, tokens, bias, known)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        each, positions = 2 * int(module.affine), x.shape[2:].numel()
        charge = (4.0 if module.affine else 2.0) * positions * (type(module) in _THOP_NORM)
        return Layer(name, "norm", module.num_features, module.num_features, 1, 1, positions, each, charge)
    if type(module) in _AVERAGE:
        positions = y.shape[2:].numel()
        charge = float(positions)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            charge = (x.shape[2:].numel() / positions + 1) * positions
        return Layer(name, "pool", x.shape[1], x.shape[1], 1, 1, positions, 0, charge)
    return None


def _window(module: nn.Module, x: Tensor, y: Tensor) -> Window | None:
    return Window.of(module, x.shape[2:], y.shape[2:]) if x.dim() == y.dim() == 4 else None
