"""The order of a group's channels by their scores, with ties broken reproducibly. Pure functions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.rng import seeded_generator


def ascending_order(name: str, worth: Tensor, seed: int) -> list[int]:
    """Sort the channels of a group by score, the smallest first; of equal scores the smaller index comes first.

    If all scores are equal, the order is drawn from (seed, name): the position of a channel says nothing about it.

    Args:
        name: name of the channel group.
        worth: (C,) finite scores.
        seed: the run's seed.
    """
    if all_tied(worth):
        return torch.randperm(len(worth), generator=seeded_generator(seed, "ties", name)).tolist()
    return sorted(range(len(worth)), key=lambda i: (float(worth[i]), i))


def all_tied(worth: Tensor) -> bool:
    """Whether a group has several channels that all have the same score."""
    return len(worth) > 1 and bool((worth == worth[0]).all())


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise PruneError if a group has scores that are not finite."""
    for name, worth in scores.items():
        bad = int((~worth.isfinite()).sum())
        if bad:
            raise PruneError(
                f"{bad} of the {len(worth)} scores of {name} are not finite, so its channels cannot be ranked. Look "
                "for infinite weights or activations in the dense network (a training that diverged, a damaged file)."
            )


def orders_of(worth: Mapping[str, Tensor], seed: int) -> dict[str, list[int]]:
    """Return group -> its channels as in ``ascending_order``."""
    return {name: ascending_order(name, scores, seed) for name, scores in worth.items()}


def tie_warnings(worth: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence about the groups whose channels all have the same score; [] if there are none."""
    tied = [name for name, scores in worth.items() if all_tied(scores)]
    if not tied:
        return []
    shown = ", ".join(tied[:3]) + (" ..." if len(tied) > 3 else "")
    values = sorted({float(worth[name][0]) for name in tied})
    scores = f"{values[0]:.6g}" if len(values) == 1 else f"{values[0]:.6g} to {values[-1]:.6g}"
    return [
        f"in {len(tied)} of {len(worth)} groups all channels have the same score ({shown}: {scores}): nothing ranks "
        "them, and which ones go is drawn from the seed. (Gates of a new network whose last batch norms start at zero "
        "are all 0, for example: train it first.)"
    ]
