"""Iterative pruning: the request of each round; the last round ends at the recipe's request. Pure functions."""

from dataclasses import replace
from typing import Literal

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.ranking import SelectionRequest, explicit_counts

Spacing = Literal["geometric", "linear"]


def share_after_round(final: float, number: int, rounds: int, spacing: Spacing) -> float:
    """Compute the share of the dense network that is left after a round.

    Args:
        final: share that is left after the last round.
        number: number of the round, from 1.
        rounds: number of rounds.
        spacing: ``geometric``: every round leaves the same share of the network before it. ``linear``: every round
            removes the same share of the dense network.
    """
    if number == rounds:
        return final
    done = number / rounds
    return final**done if spacing == "geometric" else 1 - (1 - final) * done


def round_config(
    request: SelectionRequest, graph: DependencyGraph, number: int, rounds: int, spacing: Spacing
) -> SelectionRequest:
    """Make the request of one round: its target, keep ratios and counts lie between the dense network and ``request``.

    Floors, caps and rounding are the same in every round and refer to dense widths. A threshold is applied anew in each
    round.

    Args:
        request: the recipe's request, which the last round fulfils.
        graph: dependency graph of the network that this round prunes.
        number: number of the round, from 1.
        rounds: number of rounds.
        spacing: see ``share_after_round``.
    """
    if rounds == 1:
        return request

    def at(final: float) -> float:
        return share_after_round(final, number, rounds, spacing)

    counts = request.counts
    if counts is not None:
        dense = graph.origin or graph
        final, free = explicit_counts(dense, request), {group.name: group for group in graph.free}
        counts = {
            name: round(group.dense * at(final[name] / group.dense)) for name, group in free.items() if name in final
        }
    target, ratio = request.target, request.keep_ratio
    return replace(
        request,
        target=target and (target[0], at(target[1])),
        keep_ratio=ratio and at(ratio),
        keep_ratios={glob: at(share) for glob, share in request.keep_ratios.items()},
        counts=counts,
    )
