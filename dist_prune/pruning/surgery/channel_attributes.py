"""Attributes of blocks that count channels; timm's re-parameterisable blocks read them to fuse.

MobileOne, RepVGG, FastViT and GhostNetV3 build a fused convolution from ``in_chs``, ``out_chs`` and ``groups`` of the
block, not from its layers. After surgery the layers are right and these attributes are outdated.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

IN, OUT = ("in_chs", "in_channels", "dim"), ("out_chs", "out_channels", "dim_out")
IDENTITY = ("identity", "cheap_rpr_skip")  # batch norms on the block's input itself
ASIDE = ("se", "attn", "act", "layer_scale")  # submodules with other widths than the block


# network -> (attribute with its width, submodule that makes that many channels)
NETWORKS = {"torchvision.models.vision_transformer.VisionTransformer": ("hidden_dim", "conv_proj")}


def update_channel_attributes(model: nn.Module) -> None:
    """Set the channel counts of every re-parameterisable block, and of networks, to those of the layers, in place."""
    block: Any
    for block in model.modules():
        known = NETWORKS.get(f"{type(block).__module__}.{type(block).__qualname__}")
        if known is not None:
            setattr(block, known[0], getattr(block, known[1]).out_channels)
        if not callable(getattr(block, "reparameterize", None)):
            continue
        ins, outs = _block_widths(block)
        if ins is None:
            continue
        if getattr(block, "groups", 1) > 1:  # RepVGG's ungrouped blocks and MobileOne's pointwise ones have 1
            groups = {conv.groups for conv in _convolutions(block) if conv.groups > 1}
            block.groups = groups.pop() if len(groups) == 1 else ins  # a lone batch norm is depthwise
        for key in IN:
            if isinstance(getattr(block, key, None), int):
                setattr(block, key, ins)
        for key in OUT if hasattr(block, "reparam_conv") else ():  # GhostNetV3 slices by its count, which stays
            if isinstance(getattr(block, key, None), int) and outs is not None:
                setattr(block, key, outs)
        if hasattr(block, "id_tensor"):  # it has the width before surgery
            del block.id_tensor


def _block_widths(block: nn.Module) -> tuple[int | None, int | None]:
    """Input and output channels of the block's convolutions, or of its batch norm if it has none."""
    convolutions = list(_convolutions(block))
    outs = convolutions[0].out_channels if convolutions else None
    for name in IDENTITY:
        norm = getattr(block, name, None)
        if isinstance(norm, _BatchNorm):
            return norm.num_features, outs if outs is not None else norm.num_features
    return (convolutions[0].in_channels if convolutions else None), outs


def _convolutions(block: nn.Module) -> Iterator[nn.Conv2d]:
    for name, child in block.named_children():
        if name in ASIDE:
            continue
        yield from (module for module in child.modules() if isinstance(module, nn.Conv2d))
