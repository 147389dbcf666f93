"""A network that registers with timm when this module is imported."""

from typing import Any

from timm.models import register_model

from their_network.nets import TheirNet


@register_model
def their_timm_net(pretrained: bool = False, num_classes: int = 10, in_chans: int = 3, **_: Any) -> TheirNet:
    """TheirNet, twice as wide."""
    return TheirNet(num_classes, in_chans, width=32)
