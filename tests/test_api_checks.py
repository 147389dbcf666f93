"""What the library refuses before any work: an argument of another kind, an unknown word, a number out of range."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_prune as dp
from dist_prune.errors import PruneError

BATCHES = [(torch.randn(4, 3, 8, 8), torch.arange(4) % 3) for _ in range(2)]


class Small(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def made() -> dict:
    model = Small().eval()
    graph = dp.trace(model, (3, 8, 8))
    scores = dp.score(model, graph, "l1")
    plan = dp.select(scores, graph, keep_ratio=0.5)
    return {"model": model, "graph": graph, "scores": scores, "plan": plan, "small": dp.prune(model, plan)}


def search(made: dict, **keywords: Any) -> dp.Plan:
    return dp.search(made["model"], made["scores"], made["graph"], BATCHES, target={"macs": 0.5}, **keywords)


CALLS = [
    (lambda m: dp.trace("resnet18", (3, 8, 8)), "model: 'resnet18' is given, and it has to be a torch.nn.Module"),
    (lambda m: dp.trace(m["model"], "x"), r"example: 'x' is given; write images .* or the shape \(C, H, W\)"),
    (lambda m: dp.trace(m["model"], (3, 8)), r"example: \(3, 8\) is given"),
    (lambda m: dp.trace(m["model"], torch.zeros(8, 8)), r"example: a tensor of shape \(8, 8\) is given"),
    (lambda m: dp.trace(m["model"], (3, 8, 8), depth="olny"), "depth: 'olny' is given; write True or False"),
    (lambda m: dp.trace(m["model"], (3, 8, 8), units="hole"), "units: unknown value 'hole'. Did you mean 'whole'"),
    (lambda m: dp.score(m["model"], m["scores"], "l1"), "graph: a Scores is given, and .* of dist_prune.trace"),
    (lambda m: dp.score(m["model"], m["graph"], BATCHES, "l1"), "method: a list is given; write the name of a method"),
    (lambda m: dp.score(m["model"], m["graph"], "taylor", BATCHES, images=-3), "images: -3 is given; write a whole"),
    (lambda m: dp.score(m["model"], m["graph"], "taylor", BATCHES, images=0), "images: 0 is given"),
    (lambda m: dp.score(m["model"], m["graph"], "taylor", BATCHES, micro_batch=0), "micro_batch: 0 is given"),
    (lambda m: dp.score(m["model"], m["graph"], "graph", BATCHES, hash_siz=3), "graph.hash_siz: unknown key. Did you"),
    (lambda m: dp.select(m["scores"], m["model"]), "graph: a Small is given"),
    (lambda m: dp.select({}, m["graph"]), "scores: a dict is given, and it has to be the result of dist_prune.score"),
    (lambda m: dp.select(m["scores"], m["graph"], round=8), "round: unknown key. Did you mean 'round_to'"),
    (lambda m: dp.select(m["scores"], m["graph"], macs=0.5), "macs: it is a cost: write target={'macs': 0.5}"),
    (lambda m: dp.select(m["scores"], m["graph"], target=0.5), "target: 0.5 is given; write a cost and its share"),
    (
        lambda m: dp.select(m["scores"], m["graph"], target={"flops": 0.5}),
        "target.flops: unknown key. Write target.macs",
    ),
    (lambda m: dp.select(m["scores"], m["graph"], target={"macs": 50}), "target.macs: .* less than or equal to 1"),
    (lambda m: dp.select(m["scores"], m["graph"], keep_ratio=0.5, scope="globl"), "scope: .* Did you mean 'global'"),
    (lambda m: dp.prune(m["model"], m["scores"]), "plan: a Scores is given, and it has to be a plan"),
    (lambda m: dp.save("folder", m["model"], m["plan"]), "model: 'folder' is given"),
    (lambda m: dp.costs(m["model"]), "graph: a Small is given"),
    (lambda m: dp.costs(m["graph"], m["scores"]), "plan: a Scores is given"),
    (lambda m: search(m, solver="genetic"), "solver: unknown value 'genetic'. Allowed: evolution, knapsack"),
    (lambda m: search(m, candidates=0), "candidates: 0 is given; write a whole number from 1 on"),
    (lambda m: search(m, micro_batch=0), "micro_batch: 0 is given"),
    (lambda m: search(m, repair_images=-1), "repair_images: -1 is given; write a whole number from 0 on"),
    (lambda m: dp.latency([m["model"]], (3, 8, 8)), "models: a list is given; write names"),
    (lambda m: dp.latency({"a": m["model"]}, (3, 8, 8), batch=0), "batch: 0 is given"),
]


@pytest.mark.parametrize(("call", "said"), CALLS)
def test_arguments_of_another_kind(call, said, made):
    with pytest.raises(PruneError, match=said):
        call(made)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"images": 0}, "images: 0 is given"),
        ({"micro_batch": 0}, "micro_batch: 0 is given"),
        ({"memory_mb": 0.5}, "memory_mb: 0.5 is given; write a whole number"),
        ({"ridge": 0}, "ridge: 0 is given; write a number above 0, or None"),
        ({"ridge": -1.0}, "ridge: -1.0 is given"),
        ({"ridge": float("nan")}, "ridge: nan is given"),
        ({"norms": "refitt"}, "norms: unknown value 'refitt'. Did you mean 'refit'"),
        ({"method": "leastsquares"}, "unknown method of repair 'leastsquares'"),
    ],
)
def test_what_repair_refuses(keywords, said, made):
    repair = partial(dp.repair, made["model"], made["small"], made["plan"], BATCHES)
    with pytest.raises(PruneError, match=said):
        repair(**keywords)


def test_numbers_of_numpy_are_numbers(made):
    scores = dp.score(made["model"], made["graph"], "taylor", BATCHES, images=np.int64(6), micro_batch=np.int32(3))
    again = dp.score(made["model"], made["graph"], "taylor", BATCHES, images=6, micro_batch=3)
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    shape = np.array([3, 8, 8]).tolist()
    assert dp.trace(made["model"], shape).example == (3, 8, 8)
    assert dp.trace(made["model"], torch.Size(shape)).example == (3, 8, 8)
    dp.repair(made["model"], made["small"], made["plan"], BATCHES, ridge=np.float32(0.1))
