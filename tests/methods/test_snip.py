"""The arithmetic of the Sensitivity Pruner against its vectors, and its gates against surgery."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from dist_prune import models
from dist_prune.methods.sensitivity.mask_learner import Mask, MaskLearner, MaskRules
from dist_prune.methods.sensitivity.quirks import as_released_reshape, fresh_norms, raw_logits, shrink_weights
from dist_prune.methods.sensitivity.restore_width import restore_width
from dist_prune.methods.sensitivity.snip import (
    Ramp,
    filter_scores,
    learner_input,
    majority_vote,
    sensitivities,
    target_masks,
    target_weight,
    undecided,
    xavier_reinit,
)
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny


def summed(logits, labels):
    return functional.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("c", [1.0, 0.01])
def test_sensitivity_is_the_gradient_at_a_mask_of_connections(c):
    """Against autograd through W * c itself; c = 0.01 is the shrink_weights quirk."""
    model = tiny.network().train()
    name, x, y = "layer2.0.conv1", tiny.example(), torch.tensor([3, 7])
    weight = model.get_parameter(f"{name}.weight")
    mask = torch.full_like(weight, c, requires_grad=True)
    logits = functional_call(copy.deepcopy(model), {f"{name}.weight": weight * mask}, (x,))
    (expected,) = torch.autograd.grad(functional.cross_entropy(logits, y), mask)
    if c != 1:
        shrink_weights([weight], c)
    found = sensitivities(lambda tensors: None, model, {name: weight}, x, y, summed)[name]
    assert torch.allclose(found / c, expected, rtol=1e-9, atol=1e-15), "d/dc of W c is W, the shrunken weight is W c"
    assert torch.allclose(filter_scores(found), found.abs().flatten(1).sum(1), rtol=1e-12)


def test_the_released_loss_is_the_right_class_s_logit():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.5, -1.0, 0.0]])
    assert float(raw_logits(logits, torch.tensor([2, 1]))) == -3.0


@pytest.mark.parametrize(("count", "keep"), [(7552, 0.4), (4234, 0.3), (8384, 0.5), (10, 0.25), (3, 0.1)])
def test_the_target_keeps_k_filters_of_the_pool(count, keep):
    generator = torch.Generator().manual_seed(count)
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    scores = dict(zip("abc", values.split([count // 3, count // 3, count - 2 * (count // 3)]), strict=True))
    masks = target_masks(scores, keep, "global")
    wanted = max(1, int(count * keep))
    lost = sum(not bool((scores[n] >= values.sort().values[-wanted]).any()) for n in scores)
    assert sum(int(mask.sum()) for mask in masks.values()) == wanted + lost, "and one more for each layer without any"
    layer = target_masks({"a": values}, keep, "layer")["a"]
    assert int(layer.sum()) == wanted
    assert float(values[layer].min()) > float(values[~layer].max())


def test_ties_may_keep_more_and_an_empty_layer_keeps_its_best():
    tied = target_masks({"a": torch.tensor([1.0, 2.0, 2.0, 2.0])}, 0.5, "global")["a"]
    assert tied.tolist() == [False, True, True, True]
    weak, strong = torch.arange(20.0), 100 + torch.arange(20.0)
    masks = target_masks({"weak": weak, "strong": strong}, 0.5, "global")
    assert masks["weak"].nonzero().flatten().tolist() == [18, 19], "a fifth of 0.5 of 20"
    assert masks["strong"].all()
    lone = torch.cat([torch.tensor([200.0]), weak[1:]])
    for few, kept in ((False, 1), (True, 2)):
        assert int(target_masks({"weak": lone, "strong": strong}, 0.5, "global", few)["weak"].sum()) == kept
    assert int(target_masks({"weak": torch.tensor([0.0, 1.0]), "s": strong}, 0.5, "global")["weak"].sum()) == 1


def test_what_the_mask_s_convolution_is_fed():
    signed = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    total = signed.abs().sum()
    found = learner_input(signed.abs(), total, False)
    assert found.shape == (1, 6, 3, 3)
    assert float(found.sum()) == pytest.approx(1)
    assert torch.allclose(found[0, 2], signed.abs()[2].sum(0) / total)
    assert learner_input(signed.abs(), total, True).shape == (1, 6, 1, 1)
    linear = torch.rand(5, 8)
    assert torch.allclose(learner_input(linear, linear.sum(), False).flatten(), linear.sum(1) / linear.sum())


def test_the_released_reshape_is_no_transpose():
    """It equals the intended sum only where the tensor was truly transposed before."""
    square, wide = torch.rand(5, 5, 3, 3), torch.rand(6, 4, 1, 1)
    assert torch.allclose(as_released_reshape(square).sum(1), square.sum(0)), "sums over output filters instead"
    for table in (square, wide):
        assert not torch.allclose(as_released_reshape(table).sum(1), table.sum(1))
        truly = table.transpose(0, 1).reshape(table.shape)  # what a transpose would have left in memory
        assert torch.allclose(as_released_reshape(truly).sum(1), table.sum(1))
    one = torch.rand(6, 1, 3, 3)
    assert torch.equal(as_released_reshape(one), one)


@pytest.mark.parametrize(("kept", "asked", "weight"), [(0.9, 0.4, 2.5), (0.4, 0.4, 0.0), (0.3, 0.4, 0.0)])
def test_the_penalty_s_weight(kept, asked, weight):
    assert target_weight(kept, asked) == pytest.approx(weight)


def test_a_window_votes():
    votes = torch.cat([torch.full((11, 1), 0.6), torch.full((9, 1), 0.4)])
    assert majority_vote(votes).tolist() == [True]
    close = torch.cat([torch.full((11, 1), 0.51), torch.full((9, 1), 0.01)])
    pair = torch.cat([close, torch.full((20, 1), 0.9)], 1)
    assert majority_vote(pair).tolist() == [True, True]
    assert majority_vote(pair, raw=True).tolist() == [False, True]
    assert majority_vote(torch.full((20, 1), 0.5)).tolist() == [True], "exactly one half is kept"
    half = torch.cat([torch.full((10, 2), 0.7), torch.full((10, 2), 0.1)])
    assert majority_vote(half).tolist() == [True, True], "half of the votes too"
    assert majority_vote(torch.tensor([[0.1, 0.3, 0.2]])).tolist() == [False, True, False], "never an empty layer"


def test_the_ramp_s_points():
    """8 epochs of 250 updates: 20 points, and each epoch begins with one more."""
    ramp = Ramp(1.0, 100.0, 100, epochs=8, steps=250, bump=1.0)
    assert ramp.length == 20
    assert [ramp.index(i) for i in (0, 99, 100, 249, 250, 349, 350, 500)] == [0, 0, 1, 2, 3, 3, 4, 6]
    assert ramp.index(8 * 250 - 1) == 19, "the last one is held"
    assert (ramp.value(0), ramp.value(1999)) == (1.0, 100.0)
    assert ramp.value(100) == pytest.approx(1 + 99 / 19)
    assert [ramp.open(i) for i in (0, 199, 200, 250)] == [False, False, False, True], "n / epochs = 2.5 points"
    late = Ramp(0.1, 10, 100, epochs=8, steps=250, bump=0.2, points=20)
    assert not late.open(1999)
    assert Ramp(1.0, 100.0, 100, epochs=1, steps=30, bump=1.0).value(29) == 1.0


def test_a_mask_over_a_fake_loader():
    """Windows of 4 updates, ramp of 10 points of 5: weights of the target and bumps where they are due."""
    ramp = Ramp(1.0, 10.0, 5, epochs=2, steps=25, bump=0.5, wait=1.0)
    mask = Mask(8, (1, 1), MaskRules(ramp, window=4), False, torch.Generator().manual_seed(0), torch.float64)
    assert float(mask.weight_of_target) == 0.1
    mask.input, mask.target = torch.zeros(1, 8, 1, 1, dtype=torch.float64), torch.tensor([True] * 2 + [False] * 6)
    decided, shifts = [], []
    for update in range(50):
        mask(update)
        decided.append(mask.note(update))
        shifts.append(float(mask.shift))
    assert [i for i, full in enumerate(decided) if full] == list(range(3, 50, 4))
    opened = [i for i in range(3, 50, 4) if ramp.index(i) >= 5]
    bumps = [i for i in range(1, 50) if shifts[i] != shifts[i - 1]]
    assert bumps == opened, "biases this small leave entries near a half"
    assert mask.beta(49) == pytest.approx(10 + 0.5 * len(bumps))
    kept = float(mask.kept.mean())
    assert float(mask.weight_of_target) == pytest.approx(5 * (kept - 0.25) if kept >= 0.25 else 0)
    assert mask.course[:, 3].tolist() == [0.25] * 12
    assert undecided(torch.tensor([0.5] + [0.1] * 8))
    assert not undecided(torch.tensor([0.5] + [0.1] * 9))


def test_initial_masks():
    ramp = Ramp(1.0, 1.0, 1, 1, 1, 0.0)

    def made(init, linear=False):
        return Mask(256, (3, 3), MaskRules(ramp, init=init), linear, torch.Generator().manual_seed(0), torch.float32)

    assert float(made("wide").weight.std()) == pytest.approx(10 * (2 / (9 * 256)) ** 0.5, rel=0.01)
    assert float(made("wide").bias.abs().max()) <= 1 / (9 * 256) ** 0.5
    assert float(made("he").weight.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not made("he").bias.any()
    assert float(made("wide", True).weight.std()) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("resnet20_cifar", ("layer1.0.conv1", "layer3.1.conv1")),
        ("mobilenetv2_cifar", ("blocks.1.expand.0", "blocks.5.expand.0")),
        ("vgg16_bn_hidden4096_cifar", ("features.0", "features.40", "hidden.0")),
        ("densenet40_cifar", ("dense1.0.conv", "dense1.1.conv", "dense2.3.conv")),
    ],
)
def test_a_network_masked_by_binary_vectors_is_the_cut_network(name, groups):
    """In evaluation mode, behind a first plan that has cut other groups, depthwise layers and concatenations too."""
    torch.manual_seed(0)
    model, x = models.create(name, 10, 3).double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    channels = trace_groups(model, x[:1])
    chosen = [channels.group(known_as(channels, group)) for group in groups]
    widths = {g.name: g.width for g in channels.groups}
    before = Plan({chosen[0].name: tuple(range(0, chosen[0].width, 3))}, widths)
    first = tiny.cut(model, channels, before)
    ramp = Ramp(1.0, 1.0, 1, 1, 1, 0.0)
    masks = [
        Mask(g.width, (1, 1), MaskRules(ramp), True, torch.Generator().manual_seed(0), torch.float64)
        for g in chosen[1:]
    ]
    learner = MaskLearner(first, channels, before, chosen[1:], masks).eval()
    whole = learner(x)
    gone = {g.name: tuple(range(1, g.width, 2)) for g in chosen[1:]}
    for group, mask in zip(chosen[1:], masks, strict=True):
        mask.kept[list(gone[group.name])] = 0
    plan = before.then(Plan(gone, before.counts))
    assert torch.allclose(learner(x), tiny.cut(model, channels, plan)(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(whole, learner(x))


def known_as(channels, layer: str) -> str:
    """The free group that a layer is in; for MobileNets its number counts."""
    free = [g.name for g in channels.free]
    if layer in free:
        return layer
    return next(n for n in free[int(layer.split(".")[1]) :] if len(channels.group(n).producers) == 1)


def test_scaling_where_channels_are_consumed_is_scaling_behind_the_activation():
    model, x = tiny.network(), tiny.example()
    channels = trace_groups(model, x[:1])
    group = channels.group("layer1.0.conv1")
    ramp = Ramp(1.0, 1.0, 1, 1, 1, 0.0)
    mask = Mask(16, (3, 3), MaskRules(ramp), False, torch.Generator().manual_seed(0), torch.float64)
    mask.input = torch.rand(1, 16, 3, 3, dtype=torch.float64)
    plan = Plan({}, {g.name: g.width for g in channels.groups})
    learner = MaskLearner(model, channels, plan, [group], [mask])
    learner.train()
    model.eval()
    found = learner(x)
    vector = mask.vector.detach()
    assert ((vector > 0) & (vector < 1)).all()
    conv = functional.conv2d(mask.input, mask.weight, mask.bias).flatten()
    assert torch.allclose(vector, torch.sigmoid(conv.detach()))
    block = model.get_submodule("layer1.0")
    hook = block.bn1.register_forward_hook(lambda m, i, y: torch.relu(y) * vector[None, :, None, None])
    assert torch.allclose(found, model(x))
    hook.remove()


def test_trained_weights_in_dense_shapes_are_cut_again_to_the_same():
    model, other = tiny.network(), tiny.network(seed=5)
    channels = trace_groups(model, tiny.example()[:1])
    plan = Plan({"layer2.0.conv1": (0, 3, 9), "conv1": (1,)}, {g.name: g.width for g in channels.groups})
    small = tiny.cut(other, channels, plan).state_dict()
    whole = restore_width(model.state_dict(), small, channels, plan)
    assert torch.equal(whole["layer2.0.conv1.weight"][3], model.state_dict()["layer2.0.conv1.weight"][3])
    model.load_state_dict(whole)
    again = tiny.cut(model, channels, plan).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in small.items())


def test_weights_are_drawn_anew_and_norms_stay():
    model, again = tiny.network(), tiny.network(seed=3)
    bias = model.get_submodule("bn1").bias.clone()
    state = torch.get_rng_state()
    xavier_reinit(model, 11)
    xavier_reinit(again, 11)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.conv1.weight, again.conv1.weight)
    weight = model.get_parameter("layer3.0.conv2.weight")
    assert float(weight.std()) == pytest.approx((2 / (64 * 9 + 64 * 9)) ** 0.5, rel=0.02)
    head = model.linear.weight.clone()
    xavier_reinit(model, 12, linear=False)
    assert torch.equal(head, model.linear.weight)
    assert not torch.equal(weight, again.get_parameter("layer3.0.conv2.weight"))
    assert torch.equal(bias, model.bn1.bias)
    fresh_norms(model)
    assert not model.bn1.bias.any()
