"""Residual blocks that go as a whole: their places pass on what they read."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dist_prune.errors import PruneError, unknown
from dist_prune.pruning.module_calls import first_input


class PassThrough(nn.Module):
    """What is left of a residual block: its shortcut. Further arguments of the block are taken and not read."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument, which may be given by any keyword."""
        return first_input(args, kwargs)


def places(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of all parts of blocks that are gone from a network: ``layer1.0.``."""
    return tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, PassThrough))


def remove_blocks(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace blocks of a bare network by their shortcuts, in place.

    Args:
        model: the network.
        paths: module paths of the blocks (``Plan.blocks_removed``).

    Raises:
        PruneError: the network has no such module, or it is a single layer or has no weights.
    """
    modules = dict(model.named_modules())
    for path in paths:
        if not path or path not in modules:
            why = unknown("module", path, [name for name in modules if name])
            raise PruneError(f"the plan removes a block that this network has not: {why}")
        module = modules[path]
        if next(module.children(), None) is None or next(module.parameters(), None) is None:
            raise PruneError(
                f"the plan removes {path!r} as a block, and it is a {type(module).__name__} without layers of its own; "
                "only residual blocks go as a whole"
            )
        model.set_submodule(path, PassThrough().train(module.training))
