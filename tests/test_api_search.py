"""The library's search: within the target, never worse than the uniform plan, the same on every rank."""

from typing import Any

import numpy as np
import pytest
import torch

import dist_prune as dp
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.training.bn_recalibration import recalibrate_bn
from tests.support import tiny

COUNT = 90


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    loaded = tiny.digits_feed().batches([np.arange(start, start + 30) for start in range(0, COUNT, 30)])
    return [(batch.images, batch.labels) for batch in loaded]


def searched(ranks: Any = None, **more: Any) -> dp.Plan:
    torch.set_num_threads(1)
    model = tiny.network()
    graph = dp.trace(model, (1, 8, 8))
    scores = dp.score(model, graph, "l1", group=None if ranks is None else ranks.group)
    group = {} if ranks is None or ranks.group is None else {"group": ranks.group}
    return dp.search(
        model, scores, graph, images(), target={"macs": 0.5}, candidates=12, repair_images=30, micro_batch=30, **group,
        **more,
    )  # fmt: skip


def right(plan: dp.Plan) -> int:
    """Right answers on the judging images, found the long way."""
    order = np.random.default_rng([0, 0x5EA2C4]).permutation(np.arange(COUNT))
    model, feed = tiny.network(), tiny.digits_feed()
    small = dp.prune(model, plan, dp.trace(model, (1, 8, 8)))
    recalibrate_bn(small, feed, np.sort(order[:30]), 30, Communicator())
    batch = next(feed.batches([np.sort(order[30:])]))
    with torch.no_grad():
        return int((small.eval()(batch.images).argmax(1) == batch.labels).sum())


def test_the_plan_is_within_its_target_and_not_worse_than_uniform():
    plan = searched()
    assert plan.graph is not None
    assert dp.costs(plan.graph, plan)["macs"] <= 0.5 * dp.costs(plan.graph)["macs"]
    uniform = dp.select(dp.score(tiny.network(), plan.graph, "l1"), plan.graph, target={"macs": 0.5})
    assert right(plan) >= right(uniform)


def test_ranks_agree(pool):
    alone = searched().fingerprint
    for found in pool.run(2, searched_fingerprint):
        assert found == alone


def searched_fingerprint(ranks: Any) -> str:
    return searched(ranks).fingerprint


def test_a_knapsack_needs_no_images():
    model = tiny.network()
    graph = dp.trace(model, (1, 8, 8))
    scores = dp.score(model, graph, "l1")
    plan = dp.search(model, scores, graph, target={"macs": 0.5}, solver="knapsack", round_to=4)
    assert 0.3 < dp.costs(graph, plan)["macs"] / dp.costs(graph)["macs"] <= 0.5
    assert all(len(plan.kept(group.name)) % 4 == 0 for group in graph.free)


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("graph", {}, "graph.method|gives no order of importance"),
        ("l1", {"candidates": 0}, "candidates: 0 is given; write a whole number from 1 on"),
        ("l1", {"target": {}}, "target: a search needs one"),
        ("l1", {"loader": None}, "loader: candidates are judged on images"),
        ("l1", {"rounding": 8}, "rounding"),
        ("l1", {"target": {"macs": 0.0001}}, r"target\.macs: 0\.0001 cannot be reached"),
    ],
)
def test_what_makes_no_sense_is_refused(method, arguments, said):
    model = tiny.network()
    graph = dp.trace(model, (1, 8, 8))
    scores = dp.score(model, graph, method, images())
    with pytest.raises(PruneError, match=said):
        dp.search(model, scores, graph, **{"loader": images(), "target": {"macs": 0.5}, **arguments})


def test_select_points_to_it():
    model = tiny.network()
    graph = dp.trace(model, (1, 8, 8))
    with pytest.raises(PruneError, match=r"search: dist_prune\.search finds the ratios"):
        dp.select(dp.score(model, graph, "l1"), graph, target={"macs": 0.5}, search={"candidates": 3})
