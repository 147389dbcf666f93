"""Attention modules whose layers are called, and whose heads may be fewer than the width of their input allows.

Some classes multiply by a layer's weight without calling the layer, so that no hook sees it; some reshape their heads
to the width of the input, which is right for all heads only. ``call_layers`` gives such modules another class. Their
parameters, the names of these, and their outputs (to rounding) stay.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"


def path_of(kind: type) -> str:
    """``package.module.Class``; a class that ``call_layers`` gives has the path of the one before."""
    return f"{kind.__module__}.{kind.__qualname__}"


class LinearView(nn.Linear):
    """A linear layer whose weight and bias are parameters of another module: it can be called, and has none itself.

    Args:
        owner: the module with the parameters.
        weight: name of the weight, (out, in).
        bias: name of the bias, (out,).
    """

    def __init__(self, owner: nn.Module, weight: str, bias: str):
        nn.Module.__init__(self)
        self.__dict__["view"] = (owner, weight, bias)  # no submodule: the owner holds this one

    def __setattr__(self, name: str, value: Any) -> None:
        owner, weight, bias = self.__dict__.get("view", (None, "", ""))
        if name in ("weight", "bias"):
            setattr(owner, weight if name == "weight" else bias, value)
        elif name not in ("in_features", "out_features"):  # they follow from the weight
            super().__setattr__(name, value)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """(out, in), the owner's parameter."""
        owner, name, _ = self.__dict__["view"]
        return getattr(owner, name)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """(out,), the owner's parameter, or None."""
        owner, _, name = self.__dict__["view"]
        return getattr(owner, name)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Rows of the weight."""
        return self.weight.shape[0]

    def parameters(self, recurse: bool = True) -> Any:
        """The owner's parameters, so that a tracer knows them as a layer's."""
        return iter(tensor for tensor in (self.weight, self.bias) if tensor is not None)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(n, tokens, heads * width) -> (n, heads, tokens, width)."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(n, heads, tokens, width) -> (n, tokens, heads * width)."""
    return x.transpose(1, 2).flatten(2)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    drop = module.attn_drop.p if module.training else 0.0
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=drop, is_causal=causal, scale=module.scale
    )


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias (heads * width,) to heads (n, heads, tokens, width)."""
    return x if bias is None else x + bias.view(x.shape[1], 1, -1).to(x.dtype)


def _query_key_value(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (n, heads, tokens, width); BEiT's and EVA's keys have no bias."""
    if module.qkv is not None:
        q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return _with_bias(q, module.q_bias), k, _with_bias(v, module.v_bias)
    q, k, v = (split_heads(layer(x), module.num_heads) for layer in (module.q_proj, module.k_proj, module.v_proj))
    return q, k, v


def _eva(module: Any, x: Tensor, rope: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = _query_key_value(module, x)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        rotate, half = sys.modules[type(module).__module__].apply_rot_embed_cat, getattr(module, "rotate_half", False)
        first = module.num_prefix_tokens
        q, k = (
            torch.cat([t[:, :, :first], rotate(t[:, :, first:], rope, half=half)], dim=2).type_as(v) for t in (q, k)
        )
    out = module.norm(merge_heads(_attend(module, q, k, v, attn_mask, is_causal)))
    gate = getattr(module, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


def _beit(module: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    q, k, v = _query_key_value(module, x)
    mask = shared_rel_pos_bias
    if module.relative_position_bias_table is not None:
        own = module._get_rel_pos_bias()
        mask = own if mask is None else own + mask
    return module.proj_drop(module.proj(merge_heads(_attend(module, q, k, v, mask))))


def _pyramid(module: Any, x: Tensor, feat_size: Any) -> Tensor:
    q = split_heads(module.q(x), module.num_heads)
    if module.sr is not None:
        maps = x.transpose(1, 2).unflatten(2, tuple(feat_size))
        if module.pool is not None:
            maps = module.pool(maps)
        x = module.norm(module.sr(maps).flatten(2).transpose(1, 2))
        if module.act is not None:
            x = module.act(x)
    k, v = module.kv(x).unflatten(-1, (2, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return module.proj_drop(module.proj(merge_heads(_attend(module, q, k, v))))


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask whose True forbids as one that is added; one that is added as it is."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _multihead_mask(module: Any, images: int, dtype: torch.dtype, padding: Any, mask: Any) -> Tensor | None:
    """(n or 1, heads or 1, tokens, keys) of a padding mask (n, keys) and one of (tokens, keys) or (n heads, ...)."""
    padding, mask = _additive(padding, dtype), _additive(mask, dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(images, module.num_heads, *mask.shape[1:])
    if padding is not None:
        padding = padding.view(images, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _multihead(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As ``nn.MultiheadAttention.forward``; ``is_causal`` is a hint there, and has no effect here."""
    single, first = query.dim() == 2, module.batch_first
    same = query is key and key is value
    inputs = [query] if same else [query, key, value]
    inputs = [x[None] if single else x if first else x.transpose(0, 1) for x in inputs]
    parts = [module.in_proj(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4) for x in inputs]
    q, k, v = parts[0].unbind(0) if same else (parts[0][0], parts[1][1], parts[2][2])
    mask = _multihead_mask(module, len(q), q.dtype, key_padding_mask, attn_mask)
    drop, weights = module.dropout if module.training else 0.0, None
    if need_weights:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (weights if mask is None else weights + mask).softmax(-1)
        weights = functional.dropout(weights, drop)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights[0] if single else weights
    else:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
    out = module.out_proj(merge_heads(out))
    return out[0] if single else out if first else out.transpose(0, 1), weights


_FORWARDS: dict[str, Callable[..., Any]] = {
    "timm.models.eva.EvaAttention": _eva,
    "timm.models.beit.Attention": _beit,
    "timm.models.pvt_v2.Attention": _pyramid,
    MULTIHEAD: _multihead,
}


def _new(kind: type) -> Any:
    """An empty module of the class that stands for ``kind``, as unpickling and copying want it."""
    return object.__new__(_called_class(kind))


@cache
def _called_class(kind: type) -> type:
    """The class with a forward pass of this file that stands for ``kind``, and shares its path."""
    base = nn.Module if path_of(kind) == MULTIHEAD else kind  # torch-pruning has a way of its own with torch's class
    names: dict[str, Any] = {
        "forward": _FORWARDS[path_of(kind)],
        "calls_layers": True,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": lambda self, _protocol: (_new, (kind,), self.__dict__),
    }
    return type(kind.__name__, (base,), names)


def called(module: nn.Module) -> bool:
    """Whether a module calls its layers: of a class that always does, or since ``call_layers``."""
    return path_of(type(module)) not in _FORWARDS or getattr(module, "calls_layers", False)


def call_layers(model: nn.Module, only: Iterable[str] | None = None) -> None:
    """Let every attention module call its layers, in place; a module that does already stays as it is.

    Args:
        model: a bare network. Its parameters, their names and its outputs (to rounding) stay.
        only: module paths; None: of all modules.
    """
    names = None if only is None else set(only)
    for name, module in list(model.named_modules()):
        if called(module) or (names is not None and name not in names) or not _known(module):
            continue
        kind = type(module)
        module.__class__ = _called_class(kind)
        if path_of(kind) == MULTIHEAD:
            module.in_proj = LinearView(module, "in_proj_weight", "in_proj_bias")
            module._qkv_same_embed_dim = False  # type: ignore[assignment]  # no encoder takes a path of its own


def call_layers_of_units(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Let the attention modules call their layers whose heads are channels of a plan or of a graph, in place.

    Args:
        model: a bare network.
        widths: group -> channels in the dense network.
    """
    modules, paths = dict(model.named_modules()), []
    for name, width in widths.items():
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        if owner is None or called(owner):
            continue
        layer = modules.get(name)
        if leaf == "in_proj" or (isinstance(layer, nn.Linear) and layer.out_features != width):
            paths.append(path)
    call_layers(model, paths)


def _known(module: Any) -> bool:
    """Whether the forward pass of this file can stand for the module's."""
    if path_of(type(module)) == MULTIHEAD:
        return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    return True
