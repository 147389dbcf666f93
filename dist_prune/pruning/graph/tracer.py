"""Trace a network's channel groups by torch-pruning. Works on bare models only.

Nothing is cut on trial here: ``surgery.verified_trace`` does that.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.group import Group
from torch_pruning.ops import OPTYPE

from dist_prune.errors import PruneError
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph import called_layers, head_groups, stream_layers, unit_forms
from dist_prune.pruning.graph.groups import RUNS_THROUGH, ChannelGroup, Coupling, DependencyGraph, Layer, Units
from dist_prune.pruning.graph.layer_trace import trace_layers, where_tracing_stopped
from dist_prune.pruning.network_output import copy_with, tensors_of
from dist_prune.pruning.shape_mode import ShapeMode

OUTPUTS = "its channels are the network's outputs"  # reason of a protected group that no layer reads
_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
SPREAD = 2**16  # limit: positions that one channel takes in all members of its group together
MEMBERS = 2**13  # limit: members of a group while it is traced; large residual streams have hundreds


class _PoolFollows(tp.BasePruningFunc):
    """Makes average pools, which have no weights, members of groups: the cost of a pool depends on its channels."""

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> None:
        return None

    get_in_channels = get_out_channels


def trace_dependencies(
    model: nn.Module, example: Tensor, streams: bool = False, units: Units = "earlier"
) -> DependencyGraph:
    """Trace a bare model and return its layers and channel groups as torch-pruning finds them, not yet verified.

    Groups that cannot be cut are returned too, protected with the reason. ``verified_trace.trace_groups`` verifies the
    others.

    Args:
        model: a bare network; not changed, but with other units than the earlier ones ``call_layers`` is applied.
        example: (1, C, H, W) images.
        streams: whether norms over channels and bare parameters are layers, which lose channels like any other.
        units: which whole units are found: those of earlier versions, or those of all ``unit_forms.FORMS``.

    Returns:
        The layers in module order, and the groups in module order of their leaders.

    Raises:
        PruneError: the network does not run on ``example``, cannot be traced, or has no channel group.
    """
    device = next(model.parameters()).device
    called_layers.call_layers(model, units)
    try:
        layers = trace_layers(model, example.to(device)) | head_groups.head_tables(model)
    except Exception as error:  # any error of the network's own forward
        raise PruneError(_forward_error(model, example, error)) from error
    if units != "earlier":
        layers |= unit_forms.unit_tables(model)
    if streams:
        more = stream_layers.stream_layers(model, example.to(device), layers)
        layers = stream_layers.with_stream_layers(model, layers, more)
    order = {name: number for number, name in enumerate(layers)}
    with _PatchedTorchPruning():
        graph: tp.DependencyGraph | None = None
        try:
            with suppress(Exception), ShapeMode():  # its errors are those of the other pass as well
                graph = _build_tp_graph(_copy_on_cpu(model), torch.full_like(example, torch.nan, device="cpu"))
            if graph is None:
                graph = _build_tp_graph(_copy_on_cpu(model), example.cpu())
        except Exception as error:  # torch-pruning passes on any error of its tracer
            location = where_tracing_stopped(error, layers)
            raise PruneError(f"the network could not be traced{location}: {type(error).__name__}: {error}") from error
        depth = _depths(graph)
        groups = _find_groups(graph, layers, lambda n: (depth[n], order[n]))
    if not groups:
        raise PruneError(
            "no channel group was found: the network's forward pass cuts the autograd graph (detach, no_grad)"
        )
    if streams:
        groups = stream_layers.tile_merged(groups, layers)
        layers = stream_layers.turn_parameters(model, layers, groups)
    groups = head_groups.merge_grouped_convs(groups, layers, lambda n: (depth[n], order[n]))
    groups = head_groups.replace_with_heads(model, groups, layers, streams or units != "earlier")
    if units != "earlier":
        groups = unit_forms.align_parted(model, unit_forms.replace_with_units(model, groups, layers), layers)
    layers = stream_layers.only_used(layers, groups)
    covered = sum(_count_params(layer) for layer in layers.values())
    other = sum(p.numel() for p in model.parameters()) - covered
    channels = DependencyGraph(
        layers, tuple(sorted(groups, key=lambda g: order[g.name])), other, tuple(example.shape[1:])
    )
    return _protect_shared_weights(model, channels)


def _forward_error(model: nn.Module, example: Tensor, error: Exception) -> str:
    shape = "x".join(map(str, example.shape[1:]))
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    text = f"the network does not run on images of {shape}: {reason}"
    height, width = example.shape[-2:]
    model = getattr(model, "trunk", model)  # of a tower
    if getattr(getattr(model, "patch_embed", None), "img_size", None) or "img_size" in reason:
        side = width if height == width else f"[{height}, {width}]"
        text += f" Build it for them: backbone.kwargs={{img_size: {side}}}"
    elif height != width:
        text += " Name a size that it takes, a side for squares: data.image_size"
    return text


def _protect_shared_weights(model: nn.Module, graph: DependencyGraph) -> DependencyGraph:
    """Return a copy with every group protected that has a layer with a shared or computed weight.

    Surgery gives a layer new parameters. A weight that two layers share would become two weights; one that is computed
    from other parameters (weight_norm) would be overwritten.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    # a module under two names is one layer used twice, which is nothing to protect
    first = {id(module): name for name, module in model.named_modules()}
    why: dict[str, str] = {}
    for names in owners.values():
        layers = sorted({first[id(model.get_submodule(name.rpartition(".")[0]))] for name in names})
        if len(layers) > 1:
            why |= {layer: f"{' and '.join(layers)} share one weight, which cutting would split" for layer in layers}
    for name, layer in graph.layers.items():
        if layer.kind == "parameter":
            continue
        module = model.get_submodule(name)
        if isinstance(module, called_layers.LinearView):
            continue  # its weight is its owner's
        computed = any(key not in module._parameters for key in ("weight",) if hasattr(module, key))
        if computed and getattr(module, "weight", None) is not None:
            why[name] = f"the weight of {name} is computed from other parameters (weight_norm and the like)"
    if not why:
        return graph

    def protect(group: ChannelGroup) -> ChannelGroup:
        reason = next((why[layer] for layer in group.layers if layer in why), "")
        return replace(group, protected=group.protected or reason) if reason else group

    return replace(graph, groups=tuple(protect(group) for group in graph.groups))


def _copy_on_cpu(model: nn.Module) -> nn.Module:
    return copy_with(model, lambda tensor: tensor.to("cpu", copy=True))


def _build_tp_graph(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, called_layers.RowsView):
            module.detached = True
    with warnings.catch_warnings(), evaluation_mode(model), torch.enable_grad():
        warnings.simplefilter("ignore")
        pools: dict[Any, Any] = {kind: _PoolFollows() for kind in _POOLS}
        return tp.DependencyGraph().build_dependency(
            model, example, output_transform=_traceable, customized_pruners=pools, verbose=False
        )


def _traceable(output: Any) -> list[Tensor]:
    """Return the tensors of a network's output that depend on its parameters, as torch-pruning takes them."""
    return [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]


class _PatchedTorchPruning:
    """Patches torch-pruning for the time of a trace.

    Concatenations: torch-pruning adds up the sizes of the inputs, and does not know the size of an input that comes
    from the image or from a bare parameter. Two such concatenations are accepted: those whose known inputs are as wide
    as the result (tokens are concatenated, not channels), and those without a known input (no layer's channel runs
    through them). Concatenations behind splits that torch-pruning cannot place are left unmapped; trial cuts follow.
    Reshapes: those that mix channels can spread one channel over millions of positions, which raises OverflowError
    instead of taking hours. Flattened maps are followed in networks with tokens as well (boxes whose maps are pooled,
    (images, boxes, features)); torch-pruning follows no reshape in them. Membership: members of a group are looked up
    in a set instead of compared one by one.
    """

    def __init__(self):
        self._concatenate = index_mapping.update_concat_index_mapping
        self._reshape = index_mapping.update_reshape_index_mapping
        self._add, self._has = Group.add_dep, Group.has_pruning_op

    def __enter__(self) -> None:
        original = self

        def concatenate(graph: Any, node: Any) -> None:
            try:
                original._concatenate(graph, node)
            except TypeError:
                sizes = [size for size in node.module.concat_sizes if size is not None]
                if sizes and sum(sizes) != index_mapping.shape_infer.infer_in_channels_recursively(graph, node, [0]):
                    raise
            except IndexError:  # halves of rotated positions: no channel is followed through them
                node.enable_index_mapping = False

        def reshape(graph: Any, node: Any) -> None:
            tokens, graph._2d_4d = graph._2d_4d, graph._2d_4d or _flattens(graph, node)
            try:
                original._reshape(graph, node)
            finally:
                graph._2d_4d = tokens

        def add(group: Any, dep: Any, idxs: Any) -> None:
            original._add(group, dep, idxs)
            known = group.__dict__.setdefault("known", set())
            known.add((dep.target, dep.handler, tuple(idxs)))
            group.spread = group.__dict__.get("spread", 0) + len(idxs)
            if len(known) > MEMBERS or group.spread > SPREAD * len(group[0].idxs):
                raise OverflowError("reshapes spread them over too many positions")

        def has(group: Any, dep: Any, idxs: Any) -> bool:
            return (dep.target, dep.handler, tuple(idxs)) in group.__dict__.get("known", ())

        index_mapping.update_concat_index_mapping = concatenate
        index_mapping.update_reshape_index_mapping = reshape
        Group.add_dep, Group.has_pruning_op = add, has  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        index_mapping.update_concat_index_mapping = self._concatenate
        index_mapping.update_reshape_index_mapping = self._reshape
        Group.add_dep, Group.has_pruning_op = self._add, self._has


def _flattens(graph: tp.DependencyGraph, node: Any) -> bool:
    """Whether a reshape makes maps (n, C, h, w) the features of the linear layers after it, channel by channel."""
    sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
    if len(sizes) != 4:
        return False
    waiting = list(node.outputs)
    while waiting:
        other = waiting.pop()
        if other.type == OPTYPE.LINEAR:
            return other.module.in_features == sizes[1] * sizes[2] * sizes[3]
        if other.type in (OPTYPE.RESHAPE, OPTYPE.ELEMENTWISE):  # a linear layer of tokens is a product of two reshapes
            waiting += other.outputs
    return False


def _depths(graph: tp.DependencyGraph) -> dict[str, int]:
    """Module name -> convolutions and linear layers on the longest path from the input to it, itself included."""
    depth: dict[Any, int] = {}
    stack = [(node, False) for node in graph.module2node.values()]
    while stack:
        node, ready = stack.pop()
        if ready:
            counts = (
                isinstance(node.module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
                and node.type != OPTYPE.DEPTHWISE_CONV
            )
            depth[node] = max((depth.get(before, 0) for before in node.inputs), default=0) + int(counts)
        elif node not in depth:
            depth[node] = 0  # a layer used twice closes a cycle: its first visit counts
            stack.append((node, True))
            stack += [(before, False) for before in node.inputs if before not in depth]
    return {
        graph._module2name[node.module]: d
        for node, d in depth.items()
        if isinstance(node.module, nn.Module) and node.module in graph._module2name
    }


def _find_groups(graph: tp.DependencyGraph, layers: Mapping[str, Layer], rank: Any) -> list[ChannelGroup]:
    """Find the groups of all convolutions and linear layers; ``rank`` orders producers, and the first one leads."""
    groups: list[ChannelGroup] = []
    seen: set[str] = set()
    names: dict[Any, str] = {module: name for name, module in graph.model.named_modules()}
    names |= {parameter: name for name, parameter in graph.model.named_parameters()}
    for module, name in names.items():
        layer = layers.get(name)
        if layer is None or layer.kind not in ("conv", "linear") or layer.depthwise or name in seen:
            continue
        if module in graph.module2node:
            group = _find_group(graph, module, names, layers, rank)
            seen.update(group.producers)
            groups.append(group)
    return groups


def _find_group(
    graph: tp.DependencyGraph, root: nn.Module, names: Mapping[Any, str], layers: Mapping[str, Layer], rank: Any
) -> ChannelGroup:
    """Find the group of ``root``'s outputs; its channels are numbered as the leader's outputs.

    One channel is followed first, because mapping all of them through a reshape that mixes channels can take minutes.
    """
    try:
        couplings, uncuttable = _couplings(graph, root, names, layers, 1)
        if not uncuttable:
            first = _producers(_couplings(graph, root, names, layers)[0], layers) | {names[root]}
            leader = min(first, key=rank)
            couplings, uncuttable = _couplings(graph, graph.model.get_submodule(leader), names, layers)
        else:
            leader = min(_producers(couplings, layers) | {names[root]}, key=rank)
    except Exception as error:  # torch-pruning does not follow channels through every reshape
        name = names[root]
        why = f"its channels cannot be followed ({type(error).__name__}: {error})"
        all_ = tuple(range(layers[name].width_out))
        return ChannelGroup(name, len(all_), (name,), (Coupling(name, "out", all_, all_),), why)
    ranked = tuple(sorted(_producers(couplings, layers) | {leader}, key=rank))
    group = ChannelGroup(ranked[0], layers[ranked[0]].width_out, ranked, tuple(couplings))
    return replace(group, protected=_protection_reason(graph, group, layers, uncuttable))


def _tp_members(graph: tp.DependencyGraph, module: nn.Module, channels: list[int]) -> Any:
    pruner = graph.get_pruner_of_module(module)
    assert pruner is not None
    return graph.get_pruning_group(module, pruner.prune_out_channels, channels)


def _couplings(
    graph: tp.DependencyGraph,
    leader: nn.Module,
    names: Mapping[Any, str],
    layers: Mapping[str, Layer],
    first: int | None = None,
) -> tuple[list[Coupling], list[str]]:
    """Return the couplings of the leader's (first) channels, and the members that cannot be cut channel by channel."""
    couplings, uncuttable = [], []
    for item in _tp_members(graph, leader, list(range(first or layers[names[leader]].width_out))):
        module, name = item.dep.target.module, names.get(item.dep.target.module)
        owner = (name or "").rpartition(".")[0]
        if name not in layers and owner in layers and layers[owner].kind == "layer norm":
            name = owner  # the weight of a norm that torch-pruning does not know
            if any(c.layer == name and c.index == tuple(item.idxs) for c in couplings):
                continue
        if name not in layers and f"{name}.weight" in layers:
            name = f"{name}.weight"  # an embedding's table is a bare parameter
        if name is not None and name in layers:
            out = layers[name].kind not in ("conv", "linear") or graph.is_out_channel_pruning_fn(item.dep.handler)
            couplings.append(Coupling(name, "out" if out else "in", tuple(item.idxs), tuple(item.root_idxs)))
        elif isinstance(module, nn.Parameter) or (name is not None and any(True for _ in module.parameters(False))):
            uncuttable.append(name or "a bare parameter")
    return couplings, uncuttable


def _producers(couplings: Iterable[Coupling], layers: Mapping[str, Layer]) -> set[str]:
    """Return the conv and linear layers whose outputs are the group's channels."""
    kinds = {c.layer: layers[c.layer] for c in couplings if c.side == "out"}
    return {name for name, layer in kinds.items() if layer.kind in ("conv", "linear") and not layer.depthwise}


def _protection_reason(
    graph: tp.DependencyGraph, group: ChannelGroup, layers: Mapping[str, Layer], uncuttable: list[str]
) -> str:
    """Return the reason why a group has to be protected, or an empty string."""
    if group.width == 1:
        return "it has a single channel"
    widths = sorted({layers[name].width_out for name in group.producers})
    if uncuttable:
        return f"{RUNS_THROUGH}{uncuttable[0]}, whose channels cannot be cut one by one"
    if len(widths) > 1:
        return f"its layers are {', '.join(map(str, widths))} channels wide: a shortcut pads, slices or mixes channels"
    shares = head_groups.why_uneven(group)
    if shares:
        return shares
    if not any(coupling.side == "in" for coupling in group.couplings):
        return OUTPUTS
    leader = graph.model.get_submodule(group.name)
    if any(item.dep.target.module is leader and len(item.idxs) > 1 for item in _tp_members(graph, leader, [0])):
        return "its channels are tied to one another inside the network"
    return ""


def _count_params(layer: Layer) -> int:
    kernel = (
        layer.width_out * (layer.width_in // layer.groups) * layer.kernel if layer.kind in ("conv", "linear") else 0
    )
    return kernel + layer.bias * layer.width_out
