"""What surgery must leave alone: channels moved by their place, outputs, shared and computed weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from dist_prune.cli.main import main
from dist_prune.errors import PruneError
from dist_prune.pipeline.recipe_checks import check_outputs
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery import surgeon, verified_trace
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.tasks.classification import CLASSIFICATION

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Moved(nn.Module):
    """Two convolutions with an operation on channels between them, behind a shortcut whose last norm starts at zero."""

    def __init__(self, move, hidden=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.plain, self.norm, self.head = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.move = move
        if hidden:
            nn.init.zeros_(self.norm.weight)

    def forward(self, images):
        x = self.stem(images)
        y = self.norm(self.two(self.move(self.one(x).relu())))
        return self.head(self.plain((x + y).relu()).mean((2, 3)))


def _padded(x):
    return functional.pad(x[:, 2:], (0, 0, 0, 0, 1, 1))


def _paired(x):
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if x.shape[1] % 2 == 0 else x


MOVES = {
    "roll by one": lambda x: x.roll(1, 1),
    "roll by half": lambda x: x.roll(x.shape[1] // 2, 1),
    "flip": lambda x: x.flip(1),
    "pad": _padded,
    "shuffle": _paired,
    "last doubled": lambda x: torch.cat([x[:, :-1], 2 * x[:, -1:]], 1),
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_channels_that_are_moved_by_their_place_are_left_alone(move, hidden):
    channels = trace_groups(Moved(MOVES[move], hidden).eval(), IMAGE)
    assert channels.group("one").protected
    assert not channels.group("plain").protected


@pytest.mark.parametrize("hidden", [False, True])
def test_right_groups_stay_free(hidden):
    channels = trace_groups(Moved(lambda x: x, hidden).eval(), IMAGE)
    assert [group.name for group in channels.free] == ["stem", "one", "plain"]


def test_the_trial_leaves_weights_and_statistics_alone():
    model = Moved(lambda x: x, True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace_groups(model, IMAGE)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Answering(nn.Module):
    """One network, and what it answers with."""

    def __init__(self, form, training_only=False):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head, self.extra = nn.Linear(8, 5), nn.Linear(8, 5)
        self.form, self.training_only = form, training_only

    def forward(self, images):
        x = self.stem(images).relu()
        y = self.head(self.body(x).relu().mean((2, 3)))
        return y if self.training_only and not self.training else self.form(self, x, y)


FORMS = {
    "tuple": lambda net, x, y: (y, x),
    "list": lambda net, x, y: [x, y],
    "dict": lambda net, x, y: {"scores": y, "nested": [{"map": x}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_channels_that_reach_any_output_are_protected_and_training_refuses(form):
    model = Answering(FORMS[form]).eval()
    channels = trace_groups(model, IMAGE)
    assert "outputs of the network" in channels.group("stem").protected
    assert [group.name for group in channels.free] == ["body"]
    with pytest.raises(PruneError, match=r"in evaluation mode this network gives a \w+ with .*"):
        check_outputs(CLASSIFICATION, model, IMAGE, 5, "this network")


def test_heads_in_training_mode_only_are_refused():
    model = Answering(lambda net, x, y: (y, net.extra(x.mean((2, 3)))), training_only=True).eval()
    with pytest.raises(PruneError, match="in training mode this network gives a tuple with .*"):
        check_outputs(CLASSIFICATION, model, IMAGE, 5, "this network")
    assert not model.training


def test_check_refuses_a_network_of_feature_maps(capsys):
    given = [
        "check",
        "--assume",
        "resnet56_cifar10_l1",
        "backbone.name=resnet10t",
        "backbone.kwargs={features_only: true}",
    ]
    assert main(given) == 2
    assert "features_only" in capsys.readouterr().err


def test_a_vit_on_another_image_size_names_the_key(capsys):
    given = [
        "check",
        "--assume",
        "resnet56_cifar10_l1",
        "backbone.checkpoint=",
        "backbone.name=vit_tiny_patch16_224",
        "data.image_size=96",
    ]
    assert main(given) == 2
    assert "backbone.kwargs={img_size: 96}" in capsys.readouterr().err
    assert main([*given, "backbone.kwargs={img_size: 96}"]) == 0


class Tied(nn.Module):
    """Two convolutions with one weight, between two of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.own, self.last, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 5)

    def forward(self, images):
        x = self.two(self.one(self.stem(images)).relu()).relu()
        return self.head(self.last(self.own(x).relu()).mean((2, 3)))


def test_shared_weights_are_protected_and_stay_tied():
    model = Tied().eval()
    channels = trace_groups(model, IMAGE)
    assert [group.name for group in channels.free] == ["own", "last"]
    assert "one and two share one weight" in channels.group("one").protected
    plan = Plan.from_kept(channels, {"own": [1, 2], "last": [0]})
    surgeon.apply_plan(model, channels, plan)
    assert model.one.weight is model.two.weight
    assert cost.params(channels, plan.counts) == sum(parameter.numel() for parameter in model.parameters())


class Called(nn.Module):
    """Submodules called by keyword only."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, images):
        x = self.norm(input=self.stem(input=images)).relu()
        return self.head(input=self.body(input=x).mean((2, 3)))


def test_submodules_called_by_keyword_are_cut_as_gated():
    model = Called().eval()
    channels = trace_groups(model, IMAGE)
    assert [group.name for group in channels.free] == ["stem", "body"]
    plan = Plan.from_kept(channels, {"stem": [1, 2, 7], "body": [0, 4]})
    with torch.no_grad(), gate_off(model, channels, plan.removed):
        expected = model(IMAGE)
    assert not torch.allclose(model(IMAGE), expected)
    surgeon.apply_plan(model, channels, plan)
    assert torch.allclose(model(IMAGE), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_computed_weights_are_protected(kind):
    model = Moved(lambda x: x).eval()
    kind(model.one)
    channels = trace_groups(model, IMAGE)
    assert [group.name for group in channels.free] == ["plain"]
    assert "the weight of one is computed from other parameters" in channels.group("one").protected


def test_reasons_for_repeated_channels_are_true():
    model = Moved(lambda x: x[:, :8].repeat_interleave(2, 1)).eval()
    channels = trace_groups(model, IMAGE)
    assert "network's outputs" not in channels.group("one").protected
    assert channels.group("one").protected
    assert channels.group("head").protected == "its channels are the network's outputs"


def test_a_forward_that_counts_leaves_the_network_as_it_was():
    """Its buffer is written in every mode; trial passes share the network's weights, and no buffers."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3)
            self.register_buffer("seen", torch.tensor([2.0, 3.0]))

        def forward(self, x):
            self.seen.add_(1)
            return self.second(self.first(x))

    torch.manual_seed(0)
    model = Counts().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturbed = verified_trace._perturb_constants(model)
    perturbed(torch.randn(1, 3, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert perturbed.first.weight.data_ptr() == model.first.weight.data_ptr(), "nothing is copied that need not be"


def test_constants_are_those_of_all_values():
    assert verified_trace._constant(torch.ones(100)) == 1.0
    late = torch.ones(100)
    late[99] = 2.0
    assert verified_trace._constant(late) is None
    assert verified_trace._constant(torch.zeros(3, dtype=torch.long)) is None
    assert verified_trace._constant(torch.zeros(0)) is None


def test_outputs_without_a_value_cannot_be_compared():
    class NoDetections(Moved):
        def forward(self, images):
            scores = super().forward(images)
            return {"scores": scores[scores > 1e9]}

    with pytest.raises(PruneError, match="outputs of the network are empty.*no detections"):
        trace_groups(NoDetections(torch.relu).eval(), IMAGE)
