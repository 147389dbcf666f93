"""Names of torchvision's checkpoints in timm's networks: MobileNetV2 for timm's mobilenetv2."""

import re
from collections.abc import Mapping

from torch import Tensor

STAGES = (1, 2, 3, 4, 3, 3, 1)  # inverted residuals per stage (Sandler et al. 2018, table 2)
ENDS = {"0.0": "conv_stem", "0.1": "bn1", "18.0": "conv_head", "18.1": "bn2"}
FIRST = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}  # the first block does not expand
OTHERS = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}


def translate_names(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename the tensors of torchvision's MobileNetV2 as timm's network names them; others are returned unchanged.

    Args:
        weights: name -> tensor of a checkpoint.
        wanted: state dict of the network.
    """
    if not {"features.0.0.weight", "features.18.0.weight"} <= weights.keys() or "conv_stem.weight" not in wanted:
        return weights
    return {_translate(name): tensor for name, tensor in weights.items()}


def _translate(name: str) -> str:
    blocks = [(stage, number) for stage, count in enumerate(STAGES) for number in range(count)]
    ends = re.fullmatch(r"features\.(0\.0|0\.1|18\.0|18\.1)\.(\w+)", name)
    if ends:
        return f"{ENDS[ends[1]]}.{ends[2]}"
    inner = re.fullmatch(r"features\.(\d+)\.conv\.([\d.]+)\.(\w+)", name)
    if inner and 1 <= int(inner[1]) <= len(blocks):
        stage, number = blocks[int(inner[1]) - 1]
        layer = (FIRST if inner[1] == "1" else OTHERS).get(inner[2])
        return f"blocks.{stage}.{number}.{layer}.{inner[3]}" if layer else name
    return re.sub(r"^classifier\.1\.", "classifier.", name)
