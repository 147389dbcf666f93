"""Blocks of weights in plans: canonical, composable, exact zeros; channels that are gone with their blocks."""

import copy
import json

import pytest
import torch
from torch import nn

from dist_prune.errors import PruneError
from dist_prune.methods.mint.dead_channels import promote_dead_channels
from dist_prune.pruning.plan.block_masks import block_mask, mask_violations, weight_masks, weights_left
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import WeightBlocks
from dist_prune.pruning.selection.cost import macs
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.selection.sparse_cost import csr_bytes, sparse_sizes
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

HALVES = WeightBlocks.of([range(8), range(8, 16)], [range(8), range(8, 16)], [[0], []])


def traced():
    model = tiny.network()
    return model, trace_groups(model, tiny.example()[:1])


def plan_with(channels, blocks, removed=None) -> Plan:
    return Plan(removed or {}, {g.name: g.width for g in channels.groups}, {}, blocks)


def test_a_plan_without_blocks_spells_as_before():
    plan = Plan({"a": (1,)}, {"a": 4})
    assert plan.canonical() == '{"format":1,"removed":{"a":[1]},"widths":{"a":4}}'
    masked = Plan({"a": (1,)}, {"a": 4}, {}, {"layer": HALVES})
    assert masked.fingerprint != plan.fingerprint
    again = Plan.from_json(masked.to_json())
    assert again == masked
    assert again.fingerprint == masked.fingerprint
    assert not masked.empty
    assert not Plan({}, {"a": 4}, {}, {"layer": HALVES}).empty


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.update(cut=[[0]]), "cut has 1 entries for 2 groups"),
        (lambda b: b.update(cut=[[2], []]), "below 2"),
        (lambda b: b.update(cut=[[1, 0], []]), "ascending"),
        (lambda b: b.update(rows=[[0, 1], [1, 2]]), "none of them in two groups"),
        (lambda b: b.update(columns=[[1, 0], [2]]), "ascending"),
        (lambda b: b.update(cut=[[], []]), "cut nothing"),
        (lambda b: b.update(cut=[[1], []]), "fingerprint"),
        (lambda b: b.pop("cut"), "not a plan"),
    ],
)
def test_altered_blocks_are_refused(change, said):
    body = json.loads(Plan({}, {"a": 4}, {}, {"layer": HALVES}).to_json())
    change(body["blocks"]["layer"])
    with pytest.raises(PruneError, match=said):
        Plan.from_json(json.dumps(body))


def test_surgery_zeroes_blocks_and_cuts_channels():
    model, channels = traced()
    plan = plan_with(channels, {"layer1.0.conv2": HALVES}, {"layer1.0.conv1": (1, 9)})
    small = tiny.cut(model, channels, plan)
    weight = small.get_parameter("layer1.0.conv2.weight")
    assert weight.shape == (16, 14, 3, 3)
    assert bool((weight[:8, :7] == 0).all())
    assert int((weight == 0).sum()) == 8 * 7 * 9
    masks = weight_masks(plan, channels, small.state_dict())
    assert {n: tuple(m.shape) for n, m in masks.items()} == {"layer1.0.conv2.weight": (16, 14, 3, 3)}
    assert torch.equal(masks["layer1.0.conv2.weight"], weight != 0)
    assert mask_violations(small.state_dict(), masks) == []
    weight.data[0, 0, 1, 1] = 1e-30
    assert mask_violations(small.state_dict(), masks) == ["layer1.0.conv2.weight"]
    again = rebuild(tiny.network(seed=5), plan, small.state_dict())
    assert torch.equal(again(tiny.example()), small(tiny.example()))
    with pytest.raises(PruneError, match="no plain convolution"):
        surgeon.apply_plan(copy.deepcopy(model), channels, plan_with(channels, {"bn1": HALVES}))


def test_two_plans_with_blocks_are_one_composed_plan():
    """Blocks of the second plan lie in the small network; both cut the same layer by other groups."""
    model, channels = traced()
    first = plan_with(channels, {"layer1.0.conv2": HALVES}, {"layer1.0.conv1": (1, 9), "conv1": (0,)})
    once = tiny.cut(model, channels, first)
    between = trace_groups(once, tiny.example()[:1])
    thirds = WeightBlocks.of([range(5), range(5, 10), range(10, 15)], [range(7), range(7, 14)], [[1], [0, 1], []])
    other = WeightBlocks.of([[0, 2]], [[1], [3]], [[0]])
    second = plan_with(between, {"layer1.0.conv2": thirds, "layer2.0.conv1": other}, {"layer1.0.conv1": (2,)})
    twice = tiny.cut(once, between, second)
    whole = first.then(second, channels)
    direct = tiny.cut(model, channels, whole)
    assert torch.equal(twice(tiny.example()), direct(tiny.example()))
    for name, parameter in twice.named_parameters():
        assert torch.equal(parameter, direct.get_parameter(name)), name
    with pytest.raises(PruneError, match="needs the dependency graph"):
        first.then(second)


def test_sizes_count_what_is_left():
    model, channels = traced()
    plan = plan_with(channels, {"layer1.0.conv2": HALVES}, {"layer1.0.conv1": (1, 9)})
    small = tiny.cut(model, channels, plan)
    dense = sparse_sizes(channels, plan, model.state_dict(), dense=True)
    found = sparse_sizes(channels, plan, small.state_dict())
    total = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert (dense["weights"], dense["nonzero"], dense["pruned_percent"]) == (total, total, 0)
    gone = 2 * 16 * 9 + 2 * 16 * 9 + 8 * 7 * 9
    assert found["nonzero"] == total - gone
    assert found["pruned_percent"] == pytest.approx(100 * gone / total)
    assert found["dense_bytes"] == 4 * (total - 4 * 16 * 9)
    kept = macs(channels, plan.counts)
    assert found["masked_macs"] == kept - 8 * 7 * 9 * channels.layers["layer1.0.conv2"].positions
    assert sum(n for n, _ in weights_left(plan, channels).values()) == found["nonzero"]
    assert found["csr_bytes"] < dense["csr_bytes"]


def test_a_csr_file_is_scipy_s(tmp_path):
    from scipy import sparse

    weight = torch.randn(20, 6, 3, 3) * (torch.rand(20, 6, 1, 1) < 0.3)
    sparse.save_npz(tmp_path / "w.npz", sparse.csr_matrix(weight.flatten(1).numpy()), compressed=True)
    assert csr_bytes(weight) == (tmp_path / "w.npz").stat().st_size
    assert sparse.load_npz(tmp_path / "w.npz").toarray().size == 20 * 54


class Chain(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, bias: bool):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 12, bias), nn.Linear(12, 8, bias), nn.Linear(8, 10, bias)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))


def chain(bias: bool = False):
    torch.manual_seed(0)
    model = Chain(bias).double().eval()
    return model, trace_groups(model, tiny.example()[:1])


def test_channels_that_nothing_reaches_or_that_reach_nothing_are_removed():
    """Rows 0..3 of b get nothing, columns 3..5 of b feed nothing. Without biases the outputs stay the same."""
    model, channels = chain()
    blocks = WeightBlocks.of([range(4), range(4, 8)], [range(3), range(3, 6), range(6, 12)], [[0, 1, 2], [1]])
    plan = plan_with(channels, {"b": blocks})
    masked = tiny.cut(model, channels, plan)
    found = promote_dead_channels(plan, channels, SelectionRequest())
    assert found.removed == {"a": (3, 4, 5), "b": (0, 1, 2, 3)}
    small = tiny.cut(model, channels, found)
    assert torch.allclose(masked(tiny.example()), small(tiny.example()), atol=1e-12)
    assert macs(channels, found.counts) < macs(channels)
    assert promote_dead_channels(found, channels, SelectionRequest()).removed == found.removed


def test_promotion_goes_on_with_what_it_uncovers_and_keeps_the_floor():
    model, channels = chain()
    into_b = WeightBlocks.of([range(4), range(4, 8)], [range(6), range(6, 12)], [[0, 1], [1]])
    into_c = WeightBlocks.of([range(10)], [range(4), range(4, 8)], [[1]])
    plan = plan_with(channels, {"b": into_b, "c": into_c})
    found = promote_dead_channels(plan, channels, SelectionRequest())
    assert found.counts == {"a": 1, "b": 1, "c": 10}, "all of a and b is dead; one channel of each has to survive"
    tiny.cut(model, channels, found)(tiny.example())
    wider = promote_dead_channels(
        plan_with(channels, {"b": into_b}), channels, SelectionRequest(min_channels=6, round_to=4)
    )
    assert wider.counts == {"a": 8, "b": 8, "c": 10}


def test_a_residual_stream_goes_only_where_all_its_layers_agree():
    _, channels = traced()
    stream = channels.group("conv1")
    assert len(stream.producers) > 1
    readers = [c.layer for c in stream.couplings if c.side == "in"]
    cut = {name: WeightBlocks.of([range(channels.layers[name].width_out)], [[3], [5]], [[0, 1]]) for name in readers}
    some = dict(list(cut.items())[:-1])
    assert promote_dead_channels(plan_with(channels, some), channels, SelectionRequest()).removed == {}
    assert promote_dead_channels(plan_with(channels, cut), channels, SelectionRequest()).removed == {"conv1": (3, 5)}
    assert bool(block_mask(cut[readers[0]], 16, 16)[:, [0, 1, 2]].all())
