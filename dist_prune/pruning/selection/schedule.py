"""Pruning in rounds: what each of them is asked for, so that the last one ends where one shot would. Pure."""

from dataclasses import replace
from typing import Literal

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.ranking import SelectionRequest, explicit_counts

Spacing = Literal["geometric", "linear"]


def share_after_round(final: float, number: int, rounds: int, spacing: Spacing) -> float:
    """The share of the dense network that is left after round ``number`` (from 1) of ``rounds``, ``final`` at the end.

    ``geometric``: every round leaves the same share of what the one before left. ``linear``: every round takes away
    the same share of the dense network.
    """
    if number == rounds:
        return final
    done = number / rounds
    return final**done if spacing == "geometric" else 1 - (1 - final) * done


def round_config(
    request: SelectionRequest, graph: DependencyGraph, number: int, rounds: int, spacing: Spacing
) -> SelectionRequest:
    """The request of one round: target, keep ratios and counts on their way from the dense network to ``request``.

    Floors, caps and rounding hold in every round, against dense widths; a threshold is applied anew in each.

    Args:
        graph: of the network that this round cuts.
    """
    if rounds == 1:
        return request

    def at(final: float) -> float:
        return share_after_round(final, number, rounds, spacing)

    counts = request.counts
    if counts is not None:
        dense = graph.origin or graph
        asked, free = explicit_counts(dense, request), {group.name: group for group in graph.free}
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
