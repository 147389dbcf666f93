"""Plans are data: canonical, fingerprinted, composable."""

import json

import pytest
import torch

from dist_prune.errors import PruneError
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

PLAN = Plan({"b": (0, 3), "a": (1,)}, {"a": 4, "b": 8, "c": 2}, {"c": "protected"})


def test_the_fingerprint_ignores_order_and_reasons():
    same = Plan({"a": (1,), "b": (0, 3)}, {"c": 2, "b": 8, "a": 4})
    assert same.fingerprint == PLAN.fingerprint
    assert Plan({"a": (1,), "b": (0, 4)}, PLAN.widths).fingerprint != PLAN.fingerprint
    assert Plan(PLAN.removed, {**PLAN.widths, "c": 3}).fingerprint != PLAN.fingerprint


def test_json_there_and_back():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert again.fingerprint == PLAN.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body["removed"].update(a=[2]), "fingerprint does not match"),
        (lambda body: body.update(format=99), "format 99"),
        (lambda body: body.pop("removed"), "not a plan"),
        (lambda body: body["removed"].update(a=[9]), "ascending indices below 4"),
        (lambda body: body["removed"].update(c=[0, 1]), "at least one has to survive"),
        (lambda body: body["removed"].update(z=[0]), "no group of this network"),
    ],
)
def test_altered_plans_are_refused(change, message):
    body = json.loads(PLAN.to_json())
    change(body)
    with pytest.raises(PruneError, match=message):
        Plan.from_json(json.dumps(body))


def test_composition_in_dense_coordinates():
    later = Plan({"b": (0, 5), "c": (1,)}, {"a": 3, "b": 6, "c": 2})
    both = PLAN.then(later)
    assert both.removed == {"a": (1,), "b": (0, 1, 3, 7), "c": (1,)}
    with pytest.raises(PruneError, match="group widths differ"):
        PLAN.then(PLAN)


def test_two_cuts_are_one_composed_cut():
    model, x = tiny.network(), tiny.example()
    channels = trace_groups(model, x[:1])
    first = Plan.from_kept(channels, {"conv1": [0, 2, 5, 9], "layer2.0.conv1": list(range(3, 20))})
    once = tiny.cut(model, channels, first)
    between = trace_groups(once, x[:1])
    second = Plan.from_kept(between, {"conv1": [1, 3], "layer2.0.conv1": [0, 1, 16], "layer3.0.conv1": [5]})
    twice = tiny.cut(once, between, second)
    direct = tiny.cut(model, channels, first.then(second))
    assert torch.equal(twice(x), direct(x))
    assert first.then(second).kept("conv1") == [2, 9]
