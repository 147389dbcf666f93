"""Towers: networks of timm without their head, which give features: ``features:vit_small_patch14_dinov2`` for example.

The output is a mapping: ``pooled`` (n, channels), the vector that timm's head would get, and ``patches``: the tokens
(n, tokens, channels) without class and register tokens, or the last map (n, channels, h, w).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_prune.errors import PruneError, shown
from dist_prune.models.sources import FEATURES
from dist_prune.models.timm_networks import TimmNetwork


class Tower(nn.Module):
    """A network of timm that gives its features.

    Args:
        trunk: the network, without a head.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        # the images are prepared as for the trunk; no head has numbers of classes
        config: dict[str, Any] = dict(trunk.pretrained_cfg)  # type: ignore[arg-type]
        config |= {"num_classes": 0, "architecture": f"{FEATURES}:{config.get('architecture')}"}
        self.pretrained_cfg = self.default_cfg = config

    def get_classifier(self) -> None:
        """None: a tower has no head."""
        return

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = self.trunk.forward_features(images)  # type: ignore[operator]
        pooled = self.trunk.forward_head(values, pre_logits=True)  # type: ignore[operator]
        if values.dim() == 3:
            return {"pooled": pooled, "patches": values[:, getattr(self.trunk, "num_prefix_tokens", 0) :]}
        channels = getattr(self.trunk, "num_features", values.shape[1])
        last = values.shape[-1] == channels != values.shape[1]  # maps of some networks have the channels last
        return {"pooled": pooled, "patches": values.permute(0, 3, 1, 2) if last else values}

    def without_head(self, weights: Mapping[str, Tensor], name: str, say: Callable[[str], None]) -> dict[str, Tensor]:
        """Weights of the whole network, or of a tower, as weights of the trunk.

        Args:
            weights: name -> tensor of a checkpoint.
            name: of its file.
            say: called with a line if a head is left out.
        """
        weights = {key.removeprefix("trunk."): tensor for key, tensor in weights.items()}
        heads = self.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        own = self.trunk.state_dict()
        extra = [key for key in weights if key not in own and any(key.startswith(f"{head}.") for head in heads)]
        if extra:
            say(f"{name}: the head ({', '.join(extra)}) is left out: a tower gives features")
        return {key: tensor for key, tensor in weights.items() if key not in extra}


class TowerNetwork:
    """A tower by the name of a network of timm.

    Args:
        name: ``vit_small_patch14_dinov2``, perhaps with a tag of weights after a dot.
    """

    def __init__(self, name: str):
        self.name, self.whole = name, TimmNetwork(name)

    def check(self, kwargs: Mapping[str, Any]) -> None:
        self.whole.check(kwargs)

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        trunk = self.whole.build(0, in_chans, pretrained, kwargs)
        if not (callable(getattr(trunk, "forward_features", None)) and callable(getattr(trunk, "forward_head", None))):
            raise PruneError(
                f"backbone.name: {FEATURES}:{shown(self.name)[1:-1]} has no features before its head (forward_features "
                "and forward_head of timm). Name a network of timm, or your own that gives features"
            )
        return Tower(trunk)

    def pretrained_classes(self) -> int | None:
        return None

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"{FEATURES}:{self.name}", dict(kwargs)

    def files(self) -> list[Path]:
        return []
