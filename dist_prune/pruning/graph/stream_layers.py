"""Norms over channels and bare parameters, which a residual stream runs through besides its convolutions.

They are layers of the graph only if streams are asked for (``trace_groups(..., streams=True)``): a norm over channels
has another mean and another variance once a channel is gone.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, Layer
from dist_prune.pruning.graph.layer_trace import DESCRIBED


@dataclass(frozen=True)
class NormForm:
    """How a class of norms over channels computes.

    Attributes:
        axis: of the channels in its input: -1, or 1 for maps (N, C, H, W).
        centred: whether it subtracts the mean; root-mean-square norms do not.
    """

    axis: int
    centred: bool = True


_LAST, _FIRST, _RMS, _RMS_FIRST = NormForm(-1), NormForm(1), NormForm(-1, False), NormForm(1, False)
NORMS = {
    "torch.nn.modules.normalization.LayerNorm": _LAST,
    "torch.nn.modules.normalization.RMSNorm": _RMS,
    "torch.nn.modules.normalization.GroupNorm": _FIRST,
    **dict.fromkeys(("timm.layers.norm.LayerNorm2d", "timm.layers.norm.LayerNorm2dFp32"), _FIRST),
    **dict.fromkeys(("timm.layers.norm_act.LayerNormAct2d", "timm.layers.norm_act.LayerNormAct2dFp32"), _FIRST),
    **dict.fromkeys(("timm.layers.norm.RmsNorm", "timm.layers.norm.RmsNormFp32"), _RMS),
    **dict.fromkeys(("timm.layers.norm.RmsNorm2d", "timm.layers.norm.RmsNorm2dFp32"), _RMS_FIRST),
}


def norm_form(module: nn.Module) -> NormForm | None:
    """Return how a norm over channels computes; None for other modules, and for norms over several axes."""
    for kind in type(module).__mro__:
        form = NORMS.get(f"{kind.__module__}.{kind.__qualname__}")
        if form is None:
            continue
        if len(getattr(module, "normalized_shape", (1,))) != 1:
            return None
        return _FIRST if getattr(module, "data_format", "") == "channels_first" else form
    return None


def norm_width(module: Any) -> int:
    """Return the channels of a norm for which ``norm_form`` is not None."""
    return int(module.num_channels if isinstance(module, nn.GroupNorm) else module.normalized_shape[0])


def stream_layers(model: nn.Module, example: Tensor, apart: Iterable[str]) -> dict[str, Layer]:
    """Describe every norm over channels that runs, and every bare parameter.

    Args:
        model: the bare network, in any mode; not changed.
        example: (1, C, H, W) images on the network's device.
        apart: modules whose parameters are layers already.

    Returns:
        Module path of a norm, or name of a parameter -> layer. A parameter's channels lie on its last axis that is
        wider than 1, as torch-pruning assumes.
    """
    norms = {name: module for name, module in model.named_modules() if norm_form(module) is not None}
    ran: set[str] = set()
    handles = [module.register_forward_hook(_note(ran, name)) for name, module in norms.items()]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    out = {}
    for name, norm in norms.items():
        if name in ran:
            width, affine = norm_width(norm), len(list(norm.parameters(False)))
            out[name] = Layer(name, "layer norm", width, width, getattr(norm, "num_groups", 1), bias=affine)
    for name, parameter in _bare_parameters(model, {*apart, *norms}):
        axis = max(i for i, size in enumerate(parameter.shape) if size > 1)
        width = parameter.shape[axis]
        out[name] = Layer(name, "parameter", width, width, bias=parameter.numel() // width, axis=axis)
    return out


def with_stream_layers(model: nn.Module, layers: Mapping[str, Layer], more: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return both in the order of the network's modules; a parameter follows the module that holds it."""
    both = {**more, **layers}
    names = []
    for path, module in model.named_modules():
        names += [path, *(f"{path}.{key}" if path else key for key in module._parameters)]
    return {name: both[name] for name in names if name in both}


def only_used(layers: Mapping[str, Layer], groups: Iterable[ChannelGroup]) -> dict[str, Layer]:
    """Return the layers without the norms over channels and bare parameters that no group has."""
    used = {coupling.layer for group in groups for coupling in group.couplings}
    return {
        name: layer for name, layer in layers.items() if name in used or layer.kind not in ("layer norm", "parameter")
    }


def turn_parameters(model: nn.Module, layers: Mapping[str, Layer], groups: Iterable[ChannelGroup]) -> dict[str, Layer]:
    """Return the layers with every bare parameter's channels on an axis that is as wide as the parameter's group.

    A position embedding (1, C, H, W) has its channels before its places.
    """
    turned = dict(layers)
    for group in groups:
        for coupling in group.couplings:
            layer = layers[coupling.layer]
            if layer.kind != "parameter" or layer.width_out == len(set(coupling.index)):
                continue
            shape = model.get_parameter(layer.name).shape
            axes = [axis for axis, size in enumerate(shape) if size == group.width]
            if len(axes) == 1:
                size = group.width
                turned[layer.name] = replace(
                    layer, width_in=size, width_out=size, axis=axes[0], bias=shape.numel() // size
                )
    return turned


def tile_merged(groups: Iterable[ChannelGroup], layers: Mapping[str, Layer]) -> list[ChannelGroup]:
    """Return the groups with channels that lie several times behind one another in a layer coupled to all places.

    A patch merging puts the channels of four patches behind one another, which torch-pruning's permutations do not
    follow: it names the first patch. Trial cuts verify the order.
    """

    def tile(coupling: Coupling, width: int) -> Coupling:
        layer = layers[coupling.layer]
        there = layer.width_out if coupling.side == "out" else layer.width_in
        times, rest = divmod(there, width)
        known = layer.kind == "layer norm" or (layer.kind == "linear" and coupling.side == "in")
        if not known or rest or times < 2 or sorted(coupling.index) != list(range(width)):
            return coupling
        index = tuple(time * width + position for time in range(times) for position in coupling.index)
        return replace(coupling, index=index, channel=times * coupling.channel)

    return [replace(group, couplings=tuple(tile(c, group.width) for c in group.couplings)) for group in groups]


def _note(ran: set[str], name: str) -> Any:
    return lambda *_: ran.add(name)


def _bare_parameters(model: nn.Module, apart: set[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of the parameters with channels that no known kind of layer holds.

    The table of an embedding, (places, channels), is one: transformers' position embeddings are such tables.
    """
    for path, module in model.named_modules():
        if isinstance(module, DESCRIBED) or path in apart:
            continue
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Embedding):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.numel() > 1:
                yield f"{path}.{key}" if path else key, parameter
