"""Forward passes of attention modules that call their layers and take any number and width of heads.

Each is of one class, whose parts it reads: ``FORWARDS``. The outputs are those of the class, to rounding.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"
LATENT = "timm.layers.attention_pool.AttentionPoolLatent"


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


def _parts(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(n, tokens, parts * heads * width) -> ``parts`` tensors (n, heads, tokens, width)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _project(module: Any, heads: Tensor, x: Tensor) -> Tensor:
    """The output of an attention module from merged heads, by way of its norm and its gate."""
    heads = module.norm(heads)
    gate = getattr(module, "gate", None)
    heads = heads if gate is None else heads * gate(x).sigmoid()
    return module.proj_drop(module.proj(heads))


def _query_key_value(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (n, heads, tokens, width); BEiT's and EVA's keys have no bias."""
    heads = module.num_heads
    if hasattr(module, "query_key_rows"):  # two views of one layer
        q, k = _parts(module.qk(x), 2, heads)
        v = split_heads(module.v(x), heads)
    elif module.qkv is not None:
        q, k, v = _parts(module.qkv(x), 3, heads)
    else:
        q, k, v = (split_heads(layer(x), heads) for layer in (module.q_proj, module.k_proj, module.v_proj))
    return _with_bias(q, getattr(module, "q_bias", None)), k, _with_bias(v, getattr(module, "v_bias", None))


def _vit(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = _query_key_value(module, x)
    out = _attend(module, module.q_norm(q), module.k_norm(k), v, attn_mask, is_causal)
    return _project(module, merge_heads(out), x)


def _swin(module: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = _query_key_value(module, x)
    bias = module._get_rel_pos_bias()
    if mask is not None:  # (windows, tokens, tokens); the windows of an image lie behind one another
        bias = bias + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
    return module.proj_drop(module.proj(merge_heads(_attend(module, q, k, v, bias))))


def _eva(module: Any, x: Tensor, rope: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = _query_key_value(module, x)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        rotate, half = sys.modules[type(module).__module__].apply_rot_embed_cat, getattr(module, "rotate_half", False)
        first = module.num_prefix_tokens
        q, k = (
            torch.cat([t[:, :, :first], rotate(t[:, :, first:], rope, half=half)], dim=2).type_as(v) for t in (q, k)
        )
    return _project(module, merge_heads(_attend(module, q, k, v, attn_mask, is_causal)), x)


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
    k, v = _parts(module.kv(x), 2, module.num_heads)
    return module.proj_drop(module.proj(merge_heads(_attend(module, q, k, v))))


def _latent(module: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if module.pos_embed is not None:
        x = x + module.pos_embed[None].to(x.dtype)
    q = split_heads(module.q(module.latent.expand(len(x), -1, -1)), module.num_heads)
    k, v = _parts(module.kv(x), 2, module.num_heads)
    q, k = module.q_norm(q), module.k_norm(k)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=module.scale)
    out = module.proj_drop(module.proj(merge_heads(out)))
    if module.mlp is not None:
        out = out + module.mlp(module.norm(out))
    return out[:, 0] if module.pool == "token" else out.mean(1) if module.pool == "avg" else out


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


def _multihead_parts(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    if hasattr(module, "query_key_rows"):
        return *_parts(module.qk(x), 2, module.num_heads), split_heads(module.v(x), module.num_heads)
    return _parts(module.in_proj(x), 3, module.num_heads)


def _multihead_apart(module: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values of tensors of their own: no layer makes all three, so these heads are not found."""
    total = len(module.in_proj_weight)
    rows = module.query_key_rows // 2 if hasattr(module, "query_key_rows") else total // 3
    sizes = [rows, rows, total - 2 * rows]
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.split(sizes)
    made = map(functional.linear, inputs, module.in_proj_weight.split(sizes), biases)
    return [split_heads(x, module.num_heads) for x in made]


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
    q, k, v = _multihead_parts(module, inputs[0]) if same else _multihead_apart(module, inputs)
    mask = _multihead_mask(module, len(q), q.dtype, key_padding_mask, attn_mask)
    drop, weights, scale = module.dropout if module.training else 0.0, None, module.head_dim**-0.5
    if need_weights:
        weights = (q * scale) @ k.transpose(-2, -1)
        weights = (weights if mask is None else weights + mask).softmax(-1)
        weights = functional.dropout(weights, drop)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights[0] if single else weights
    else:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    out = module.out_proj(merge_heads(out))
    return out[0] if single else out if first else out.transpose(0, 1), weights


FORWARDS: dict[str, Callable[..., Any]] = {
    "timm.layers.attention.Attention": _vit,
    "timm.models.swin_transformer.WindowAttention": _swin,
    "timm.models.eva.EvaAttention": _eva,
    "timm.models.beit.Attention": _beit,
    "timm.models.pvt_v2.Attention": _pyramid,
    LATENT: _latent,
    MULTIHEAD: _multihead,
}
