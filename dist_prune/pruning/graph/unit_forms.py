"""Whole units by the class of their module: heads of attention modules, and pairs of gated perceptrons.

Found if a trace asks for them (``trace_groups(..., units="whole")``): earlier versions know the classes of
``head_groups.ATTENTION`` alone, and their plans stay. A form declares the layers that make the units and the one that
reads them; everything else follows from the layers' widths. Trial cuts verify.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dist_prune.pruning.graph.attention_forwards import LATENT, MULTIHEAD
from dist_prune.pruning.graph.called_layers import called, path_of
from dist_prune.pruning.graph.groups import RUNS_THROUGH, ChannelGroup, Coupling, Layer, Unit


@dataclass(frozen=True)
class Form:
    """How a class of modules makes whole units.

    Attributes:
        inputs: (submodule, parts) of the layers whose outputs are units: ``parts`` blocks of all units behind one
            another, 3 for queries, keys and values of one layer. Absent ones are left out.
        output: submodule that reads the units.
        heads: attribute with the number of units, or "": every output is a unit of its own.
        shared: attribute with the number of keys and values if several heads share them, or "".
        totals: attributes that hold heads * head width.
        first: attribute that says that the parts of one head lie behind one another (heads, parts, width), or "".
        beside: bare parameters with an entry for each output, as biases of queries.
        norm: submodule that is a norm over all units; it must be a layer of the graph, absent or ``nn.Identity``.
        table: parameter (rows, heads) of relative positions, or "".
        relative: submodule that makes an offset for each head from relative positions, or "".
        unit: what the units are called.
        whole: whether whole units are found here; those of ``head_groups.ATTENTION`` are found there as well.
    """

    inputs: tuple[tuple[str, int], ...] = (("qkv", 3),)
    output: str = "proj"
    heads: str = "num_heads"
    shared: str = ""
    totals: tuple[str, ...] = ()
    first: str = ""
    beside: tuple[str, ...] = ()
    norm: str = ""
    table: str = ""
    relative: str = ""
    unit: Unit = "head"
    whole: bool = True


_SPLIT = (("qkv", 3), ("q_proj", 1), ("k_proj", 1), ("v_proj", 1), ("gate", 1))
_MAXVIT = Form(first="head_first", relative="rel_pos")
FORMS = {
    "timm.layers.attention.Attention": Form((("qkv", 3), ("gate", 1)), totals=("attn_dim",), norm="norm"),
    "timm.layers.attention.AttentionRope": Form(_SPLIT, shared="num_kv_heads", totals=("attn_dim",), norm="norm"),
    "timm.models.swin_transformer.WindowAttention": Form(whole=False),
    "timm.models.eva.EvaAttention": Form(_SPLIT, beside=("q_bias", "v_bias"), norm="norm"),
    "timm.models.beit.Attention": Form(beside=("q_bias", "v_bias"), table="relative_position_bias_table"),
    "timm.models.pvt_v2.Attention": Form((("q", 1), ("kv", 2))),
    "timm.models.vision_transformer_sam.Attention": Form(),
    LATENT: Form((("q", 1), ("kv", 2))),
    "timm.models.hiera.MaskUnitAttention": Form(heads="heads", totals=("dim_out",)),
    "timm.models.hieradet_sam2.MultiScaleAttention": Form(),
    "timm.models.maxxvit.AttentionCl": _MAXVIT,
    "timm.models.maxxvit.Attention2d": _MAXVIT,
    MULTIHEAD: Form((("in_proj", 3),), "out_proj"),
    "timm.layers.mlp.GluMlp": Form((("fc1", 2),), "fc2", "", norm="norm", unit="pair"),
}
# class -> (submodule, attribute with a number of parts): its outputs are parts behind one another, each with an entry
# for every channel of a group that they multiply. torch-pruning takes the entries of a channel for neighbours.
PARTED = {"timm.layers.selective_kernel.SelectiveKernelAttn": ("fc_select", "num_paths")}
_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class _Declared:
    """Units of one module: their group, and layers of other groups that lose their positions with it."""

    group: ChannelGroup
    beside: tuple[str, ...] = ()


def modules_of_forms(model: nn.Module) -> Iterator[tuple[str, Any, Form]]:
    """Yield (path, module, form) of the modules with units that call their layers."""
    for name, module in model.named_modules():
        form = FORMS.get(path_of(type(module)))
        if form is not None and called(module):
            yield name, module, form


def unit_tables(model: nn.Module) -> dict[str, Layer]:
    """Describe the bare parameters with an entry for each head or for each output of a head."""
    layers = {}
    for name, module, form in modules_of_forms(model):
        keys = [f"{name}.{key}" for key in form.beside if getattr(module, key, None) is not None]
        for path, axis in [(key, 0) for key in keys] + list(_tables(name, module, form)):
            shape = model.get_parameter(path).shape
            layers[path] = Layer(
                path, "parameter", shape[axis], shape[axis], bias=shape.numel() // shape[axis], axis=axis
            )
    return layers


def replace_with_units(
    model: nn.Module, groups: Iterable[ChannelGroup], layers: Mapping[str, Layer]
) -> list[ChannelGroup]:
    """Return the groups, with those of a module with units replaced by the group of its units.

    Args:
        model: the bare network.
        groups: its groups as traced channel by channel.
        layers: its layers, with ``unit_tables``.
    """
    groups = list(groups)
    for name, module, form in modules_of_forms(model):
        if not form.whole and not hasattr(module, "query_key_rows"):
            continue
        narrowed = hasattr(module, "query_key_rows")
        found = list((_declare_widths if narrowed else _declare)(name, module, form, layers))
        makers = {path for one in found for path in one.group.producers}
        own = makers | {path for one in found for path in one.beside}
        members = [group for group in groups if set(group.producers) <= own]
        if makers <= {path for member in members for path in member.producers}:
            groups = [group for group in groups if group not in members] + [one.group for one in found]
    return groups


def align_parted(model: nn.Module, groups: Iterable[ChannelGroup], layers: Mapping[str, Layer]) -> list[ChannelGroup]:
    """Return the groups, with the positions of their channels in layers of ``PARTED`` as those layers have them.

    Such a layer follows its group; it is no producer, because its outputs are factors of channels. Trial cuts verify.

    Args:
        model: the bare network.
        groups: its groups as traced channel by channel.
        layers: its layers.
    """
    groups = list(groups)
    for name, module in model.named_modules():
        key, parts = PARTED.get(path_of(type(module)), ("", ""))
        layer = layers.get(f"{name}.{key}")
        if not key or layer is None:
            continue
        for number, group in enumerate(groups):
            made = {layers[path].width_out for path in group.producers if path != f"{name}.{key}"}
            if layer.name not in group.producers or made != {group.width}:
                continue
            if layer.width_out != getattr(module, parts) * group.width:
                continue
            own = Coupling(
                layer.name, "out", tuple(range(layer.width_out)), tuple(i % group.width for i in range(layer.width_out))
            )
            others = tuple(c for c in group.couplings if (c.layer, c.side) != (layer.name, "out"))
            producers = tuple(path for path in group.producers if path != layer.name)
            groups[number] = replace(group, producers=producers, couplings=(*others, own), protected="")
    return groups


def update_units(model: nn.Module) -> None:
    """Set the counts of units to those of the layers, in place; a network that lost nothing does not change."""
    for _, module, form in modules_of_forms(model):
        if path_of(type(module)) == MULTIHEAD:
            module.embed_dim = module.kdim = module.vdim = module.out_proj.out_features
        if not form.heads or not form.whole or hasattr(module, "query_key_rows"):
            continue
        total, before = _width(getattr(module, form.output), "in"), getattr(module, form.heads)
        heads = total // head_width(module)
        if form.shared:
            setattr(module, form.shared, getattr(module, form.shared) * heads // before)
            module.kv_dim = getattr(module, form.shared) * head_width(module)
        setattr(module, form.heads, heads)
        for key in form.totals:
            setattr(module, key, total)
        relative = getattr(module, form.relative, None) if form.relative else None
        if relative is not None:
            _set_heads(relative, heads)


def head_width(module: Any) -> int:
    """Outputs of one head in each part of an attention module."""
    for key in ("head_dim", "dim_head"):
        if hasattr(module, key):
            return int(getattr(module, key))
    return round(module.scale**-2)


def _declare(name: str, module: Any, form: Form, layers: Mapping[str, Layer]) -> Iterator[_Declared]:
    """Yield the group of a module's units; nothing where its layers are not as the form says."""
    output = f"{name}.{form.output}"
    inputs = [(f"{name}.{key}", parts) for key, parts in form.inputs if _present(module, key)]
    norm = f"{name}.{form.norm}" if form.norm and _present(module, form.norm) else ""
    if not {output, *(path for path, _ in inputs), *([norm] if norm else [])} <= layers.keys():
        return
    width = layers[output].width_in
    heads = getattr(module, form.heads) if form.heads else width
    units = getattr(module, form.shared) if form.shared else heads
    if width % heads or heads % units:
        return
    couplings = []
    for path, parts in inputs:
        there, each = layers[path].width_out, layers[path].width_out // parts
        whole = width * units // heads if path.endswith(("k_proj", "v_proj")) else width
        if there != parts * whole or layers[path].groups != 1:
            return
        first = bool(form.first) and bool(getattr(module, form.first))
        couplings.append(_spread(path, "out", there, units, 1 if first else parts, each))
    couplings.append(_spread(output, "in", width, units))
    if norm:
        couplings.append(_spread(norm, "out", width, units))
    couplings += [_spread(f"{name}.{key}", "out", width, units) for key in form.beside if f"{name}.{key}" in layers]
    couplings += [_spread(path, "out", heads, units) for path, _ in _tables(name, module, form)]
    beside = tuple(_offsets(name, module, form))
    if not set(beside) <= layers.keys():
        return
    couplings += [_spread(path, "out", heads, units) for path in beside]
    producers = tuple(path for path, _ in inputs)
    why = f"it has a single {form.unit}" if units == 1 else ""
    yield _Declared(ChannelGroup(producers[0], units, producers, tuple(couplings), why, unit=form.unit), beside)


def _declare_widths(name: str, module: Any, form: Form, layers: Mapping[str, Layer]) -> Iterator[_Declared]:
    """Yield the positions of queries with keys, and those of values with outputs, of all heads of a module alike."""
    keys, values, output = (f"{name}.{key}" for key in ("qk", "v", form.output))
    norm = f"{name}.{form.norm}" if form.norm and _present(module, form.norm) else ""
    if not {keys, values, output} <= layers.keys():
        return
    heads = getattr(module, form.heads)
    gate = [f"{name}.gate"] if _present(module, "gate") else []
    beside = [f"{name}.{key}" for key in form.beside]
    beside = [path for path in beside if path in layers]
    normed = _present(module, "q_norm") or _present(module, "k_norm")
    shared = [keys, *(path for path in beside if path.endswith("q_bias"))]
    found = _positions(shared, [], layers, heads)
    why = "a norm of each head's queries or keys runs over them" if normed else found.group.protected
    yield replace(found, group=replace(found.group, protected=why))
    if not norm or norm in layers:
        own = [values, *gate, *(path for path in beside if path.endswith("v_bias")), *([norm] if norm else [])]
        yield _positions(own, [output], layers, heads)
    else:
        found = _positions([values], [output], layers, heads)
        why = f"{RUNS_THROUGH}{norm}, whose channels cannot be cut one by one"
        yield replace(found, group=replace(found.group, protected=why))


def _positions(outs: Sequence[str], ins: Sequence[str], layers: Mapping[str, Layer], heads: int) -> _Declared:
    """The group of the positions within heads; the parts of its first layer, and all heads, lose the same."""
    parts = 1 if ins else 2
    width = layers[outs[0]].width_out // (parts * heads)
    sides = [(path, "out", layers[path].width_out) for path in outs] + [(p, "in", layers[p].width_in) for p in ins]
    couplings: list[Any] = [
        Coupling(path, side, tuple(range(there)), tuple(i % width for i in range(there)))  # type: ignore[arg-type]
        for path, side, there in sides
    ]
    producers = tuple(path for path in outs if layers[path].kind in ("conv", "linear"))
    why = "it has a single head position" if width == 1 else ""
    return _Declared(ChannelGroup(outs[0], width, producers, tuple(couplings), why, unit="head position"))


def _spread(layer: str, side: Any, width: int, units: int, parts: int = 1, each: int = 0) -> Coupling:
    """Couple ``width`` positions, ``parts`` blocks behind one another, each of all units in order."""
    each = each if parts > 1 else width
    return Coupling(layer, side, tuple(range(width)), tuple(i % each * units // each for i in range(width)))


def _present(module: nn.Module, key: str) -> bool:
    submodule = getattr(module, key, None)
    return submodule is not None and not isinstance(submodule, nn.Identity)


def _tables(name: str, module: Any, form: Form) -> Iterator[tuple[str, int]]:
    """Yield (parameter, axis of the heads) of an attention module's tables of relative positions."""
    if form.table and getattr(module, form.table) is not None:
        yield f"{name}.{form.table}", 1
    relative = getattr(module, form.relative, None) if form.relative else None
    table = getattr(relative, "relative_position_bias_table", None)
    if table is not None:
        yield f"{name}.{form.relative}.relative_position_bias_table", 0 if table.dim() == 3 else 1


def _offsets(name: str, module: Any, form: Form) -> Sequence[str]:
    """The layers with one output for each head, of a perceptron on relative positions."""
    relative = getattr(module, form.relative, None) if form.relative else None
    layer = getattr(getattr(relative, "mlp", None), "fc2", None)
    return [f"{name}.{form.relative}.mlp.fc2"] if isinstance(layer, nn.Linear) else []


def _set_heads(relative: Any, heads: int) -> None:
    """Set the counts of a module of relative positions of timm."""
    if hasattr(relative, "num_heads"):
        relative.num_heads = heads
    table = getattr(relative, "relative_position_bias_table", None)
    shape = relative.bias_shape
    relative.bias_shape = (heads, *shape[1:]) if table is not None and table.dim() == 3 else (*shape[:-1], heads)


def _width(layer: Any, side: str) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels if side == "in" else layer.out_channels
    return layer.in_features if side == "in" else layer.out_features
