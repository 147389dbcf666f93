"""Pruning in rounds: what each of them is asked for, so that the last one ends where one shot would. Pure."""

from dataclasses import replace
from typing import Literal

from dist_prune.pruning.channels import Channels
from dist_prune.pruning.choose import Request, given_counts

Spacing = Literal["geometric", "linear"]


def share_at(final: float, number: int, rounds: int, spacing: Spacing) -> float:
    """The share of the dense network that is left after round ``number`` (from 1) of ``rounds``, ``final`` at the end.

    ``geometric``: every round leaves the same share of what the one before left. ``linear``: every round takes away
    the same share of the dense network.
    """
    if number == rounds:
        return final
    done = number / rounds
    return final**done if spacing == "geometric" else 1 - (1 - final) * done


def scheduled(request: Request, channels: Channels, number: int, rounds: int, spacing: Spacing) -> Request:
    """The request of one round: target, keep ratios and counts on their way from the dense network to ``request``.

    Floors, caps and rounding hold in every round, against dense widths; a threshold is applied anew in each.

    Args:
        channels: of the network that this round cuts.
    """
    if rounds == 1:
        return request

    def at(final: float) -> float:
        return share_at(final, number, rounds, spacing)

    counts = request.counts
    if counts is not None:
        dense = channels.origin or channels
        asked, free = given_counts(dense, request), {group.name: group for group in channels.free}
        counts = {
            name: round(group.dense * at(asked[name] / group.dense)) for name, group in free.items() if name in asked
        }
    target, ratio = request.target, request.keep_ratio
    return replace(
        request,
        target=target and (target[0], at(target[1])),
        keep_ratio=ratio and at(ratio),
        keep_ratios={glob: at(share) for glob, share in request.keep_ratios.items()},
        counts=counts,
    )
