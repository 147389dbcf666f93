"""The law of rounds: the network that a plan left can be scored and cut again, the same on any number of ranks."""

from dataclasses import replace

import pytest

from dist_prune import methods
from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share
from dist_prune.pruning.selection.schedule import round_config
from tests.support import tiny

HALF = SelectionRequest(target=("macs", 0.5))


def two_rounds(ranks: Communicator, name: str) -> tuple[str, float]:
    """The fingerprint of both rounds' plan in dense coordinates, and the share of the MACs that is left."""
    method, first = tiny.method(name), tiny.bench(tiny.network(), ranks, images=3 * tiny.MICRO)
    dense = method.prepare(method.prunable(first.graph), (), HALF)
    first.graph = dense
    plan = method.select(method.score(first), dense, round_config(HALF, dense, 1, 2, "geometric"))
    left = graph_after(dense, plan)
    again = replace(tiny.bench(tiny.cut(tiny.network(), dense, plan), ranks, images=3 * tiny.MICRO), graph=left)
    cut = method.select(method.score(again), left, round_config(HALF, left, 2, 2, "geometric"))
    whole: Plan = plan.then(cut)
    return whole.fingerprint, cost_share(dense, "macs", whole.counts)


@pytest.mark.parametrize("name", [name for name in methods.list_names() if not methods.find(name).why_one_shot])
def test_a_second_round_goes_to_the_target(name, pool):
    found = {result for world in (1, 2) for result in pool.run(world, two_rounds, name)}
    assert len(found) == 1
    assert 0.4 < found.pop()[1] <= 0.5
