"""Where a backbone's name leads: timm's registry or a folder of timm, torchvision, transformers, a module.

=================================  =================================================================================
name                               network
=================================  =================================================================================
``resnet50.a1_in1k``               timm's registry, which has this package's networks
``hf-hub:owner/name``              a repository of timm on the Hugging Face hub
``local-dir:FOLDER``               a folder that timm has saved (config.json, model.safetensors)
``torchvision:resnet50``           torchvision's classifiers, ``torchvision:resnet50.IMAGENET1K_V1`` for other weights
``transformers:FOLDER_OR_NAME``    image classifiers of transformers; ``transformers:vit`` is a model type
``features:resnet50``              a network of timm's registry without its head, which gives features
``package.module:callable``        a class or function that is imported: this runs code
``./file.py:callable``             the same from a file; the path is relative to the working folder
=================================  =================================================================================
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dist_prune.errors import PruneError, shown

HUB, LOCAL, TORCHVISION, TRANSFORMERS = "hf-hub", "local-dir", "torchvision", "transformers"
FEATURES = "features"


class NetworkSource(Protocol):
    """One network that a name leads to."""

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Check name and arguments without building the network; PruneError if one of them is wrong."""
        ...

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        """Build the network, whose output is one tensor (images, classes).

        Its attribute ``pretrained_cfg`` has timm's fields (``input_size``, ``mean``, ``std``, ``num_classes`` of the
        weights), as far as they are known.
        """
        ...

    def pretrained_classes(self) -> int | None:
        """The number of classes of the pretrained weights; None if there are none or it is not known."""
        ...

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Name and arguments under which another machine builds the same network, without these files."""
        ...

    def files(self) -> list[Path]:
        """Files on this machine that decide the network or its weights; their content may not change within a run."""
        ...


def prefix_of(name: str) -> str:
    """The part of a name before its colon if it is one of the declared ones, ``code`` for user code, else empty."""
    prefix = name.partition(":")[0]
    if prefix in (HUB, LOCAL, TORCHVISION, TRANSFORMERS, FEATURES):
        return prefix
    return "code" if ":" in name else ""


def is_code(name: str) -> bool:
    """Whether a name is a callable of a module or file, which is never imported because a bundle names it."""
    return prefix_of(name) == "code"


def check_portable(name: str) -> None:
    """Refuse the names in a bundle that would read a path of this machine or fetch from a hub.

    Raises:
        PruneError: the name is none of timm's registry, torchvision's or a model type of transformers.
    """
    prefix, _, rest = name.partition(":")
    if prefix in (HUB, LOCAL) or (prefix == TRANSFORMERS and not re.fullmatch(r"[\w-]+", rest)):
        raise PruneError(f"the bundle's backbone is {shown(name)}: a bundle may name neither a path nor a repository")
