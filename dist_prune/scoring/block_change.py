"""What residual blocks change: the score by which whole blocks are ranked.

For a block with input x and output y = x + f(x) the change is

    1 - <x, y> / (|x| |y|)

over all entries of an image's x and y, averaged over the calibration images: 0 if the block only scales what it reads.
It needs no label and no gradient. (Men et al., ShortGPT, 2024, equation 1, takes the mean over tokens instead.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.module_calls import first_input
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.scoring.ordered_sums import OrderedSums


def block_changes(scoring: DistributedScoringContext) -> dict[str, Tensor]:
    """Measure the change of every residual block that may go. Collective.

    Args:
        scoring: the network, its graph, the calibration images and the ranks.

    Returns:
        ``Block.key`` -> (1,) float64 on the CPU, in [0, 2]; the same bits for every number of ranks.

    Raises:
        PreemptedError: on every rank, if one of them was asked to stop.
        PruneError: on every rank, if a block reads or returns values that are not finite.
    """
    blocks = scoring.graph.free_blocks
    if not blocks:
        return {}
    sums = OrderedSums({block.key: (1,) for block in blocks}, scoring.ids, scoring.micro_batch, scoring.device)
    handles, read = [], {}
    for block in blocks:

        def keep(_module: nn.Module, args: Any, kwargs: Any, key: str = block.key) -> None:
            read[key] = first_input(args, kwargs).clone()  # a block may write into what it reads

        def note(_module: nn.Module, _args: Any, output: Tensor, key: str = block.key) -> None:
            sums.add(key, _changes(read.pop(key), output).sum()[None])

        module = scoring.model.get_submodule(block.path)
        handles += [module.register_forward_pre_hook(keep, with_kwargs=True), module.register_forward_hook(note)]
    try:
        found = sums.run(
            scoring.model, scoring.loader, scoring.environment.comm, "while the change of blocks was measured",
            scoring.tracker,
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    if bad := [block.path for block in blocks if not bool(found[block.key].isfinite())]:
        raise PruneError(
            f"how much {len(bad)} residual blocks change what they read cannot be measured ({', '.join(bad[:3])}): "
            "they read or return values that are not finite. Look for infinite weights in the dense network, or "
            "activations beyond the range of its dtype; without blocks (select.depth=false) nothing of this is measured"
        )
    return {key: (total / scoring.images).cpu() for key, total in found.items()}


def _changes(x: Tensor, y: Tensor) -> Tensor:
    """(n,) float64, one of each image."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return 1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
