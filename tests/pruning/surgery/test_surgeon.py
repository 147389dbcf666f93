"""Groups, protection, surgery and rebuilding on timm's networks and on odd ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.errors import PruneError
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.tracking import Tracker
from tests.support import tiny

SLOW = pytest.mark.slow
TIMM = ["resnet18", "mobilenetv2_100", pytest.param("densenet121", marks=SLOW), pytest.param("vgg16_bn", marks=SLOW)]


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_are_scored_pruned_and_run(name, data):
    """The recipe's own path on real ImageNet images: hashes, plan, surgery, forward, rebuild, gates."""
    torch.manual_seed(0)
    model = models.create(name, 1000, 3).eval()
    source = open_source("imagefolder", str(data / "imagenet_1000"), "val", True)
    feed = ImageLoader(
        source, TransformConfig(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875), torch.device("cpu")
    )
    channels = trace_groups(model, torch.randn(1, 3, 64, 64))
    bench = DistributedScoringContext(
        model, channels, feed, np.arange(4), tiny.machine(), Tracker(False), micro_batch=4
    )
    method = tiny.method("graph")
    scores = method.score(bench)
    plan = method.select(scores, channels, SelectionRequest(target=("macs", 0.7)))
    images = next(feed.batches([bench.ids])).images
    with gate_off(model, channels, plan.removed), torch.no_grad():
        expected = model(images)
    surgeon.apply_plan(model, channels, plan)
    with torch.no_grad():
        found = model(images)
    rebuilt = rebuild(models.create(name, 1000, 3), plan, model.state_dict()).eval()
    assert len(channels.free) > 10
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    with torch.no_grad():
        assert torch.equal(rebuilt(images), found)


def test_option_a_protects_streams_stem_and_head():
    channels = trace_groups(models.create("resnet20_cifar", 10, 3).eval(), torch.randn(1, 3, 32, 32))
    assert [group.name for group in channels.free] == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]
    stem = channels.group("conv1")
    assert {"conv1", "layer1.0.conv2", "layer3.2.conv2"} <= set(stem.producers)
    assert "16, 32, 64 channels wide" in stem.protected
    assert channels.group("linear").protected == "its channels are the network's outputs"


def test_projection_form_has_three_streams_led_by_stem_and_shortcuts():
    channels = trace_groups(models.create("resnet20p_cifar", 10, 3).eval(), torch.randn(1, 3, 32, 32))
    streams = {group.name: group.producers for group in channels.free if len(group.producers) > 1}
    assert list(streams) == ["conv1", "layer2.0.downsample.0", "layer3.0.downsample.0"]
    assert streams["conv1"] == ("conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2")


class Odd(nn.Module):
    """What trips tracers: a 1-channel convolution, a grouped one, a layer norm, weights used twice, a flatten."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 1, 1)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 16, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(self.first(self.one(x))))
        x = self.shared(torch.relu(self.shared(x)))
        return self.head(self.norm(self.hidden(self.last(x).flatten(1))))


def test_odd_shapes_are_protected_or_right():
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 3, 4, 4)
    channels = trace_groups(model, x[:1])
    reasons = {group.name: group.protected for group in channels.groups}
    assert reasons["one"] == "it has a single channel"
    assert channels.group("first").unit == "conv group"
    assert channels.group("first").width == 2
    assert "norm" in reasons["hidden"]
    assert not reasons["last"]
    plan = Plan.from_kept(channels, {group.name: [1, 3] if group.width > 2 else [1] for group in channels.free})
    with gate_off(model, channels, plan.removed):
        expected = model(x)
    small = tiny.cut(model, channels, plan)
    assert torch.allclose(small(x), expected, atol=1e-5)
    assert small.hidden.in_features == 2 * 16


def test_layers_used_twice_and_half_depthwise_are_counted_right():
    import thop

    from dist_prune.pruning.selection import cost

    class Half(Odd):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(8, 4, 3, padding=1, groups=4)
            self.widen = nn.Conv2d(4, 8, 1)

        def forward(self, x):
            x = self.widen(torch.relu(self.grouped(self.first(self.one(x)))))
            x = self.shared(torch.relu(self.shared(x)))
            return self.head(self.hidden(self.last(x).flatten(1)))

    model, x = Half().eval(), torch.randn(1, 3, 4, 4)
    del model.norm
    channels = trace_groups(model, x)
    plan = Plan.from_kept(channels, {group.name: [0, 1] for group in channels.free})
    for network, counts in ((model, {}), (tiny.cut(model, channels, plan), plan.counts)):
        assert cost.params(channels, counts) == sum(parameter.numel() for parameter in network.parameters())
        assert cost.macs(channels, counts, "thop") == thop.profile(copy.deepcopy(network), (x,), verbose=False)[0]


def test_a_network_that_cannot_be_traced_says_so():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x).detach()

    with pytest.raises(PruneError, match="no channel group"):
        trace_groups(Broken(), torch.randn(1, 3, 4, 4))


def test_tracing_leaves_the_model_alone():
    model = tiny.network().train()
    before = copy.deepcopy(model.state_dict())
    trace_groups(model, tiny.example()[:1])
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


def test_a_plan_of_another_network_is_refused():
    model = tiny.network()
    channels = trace_groups(model, tiny.example()[:1])
    with pytest.raises(PruneError, match="belongs to another network"):
        surgeon.apply_plan(model, channels, Plan({"conv1": (0,)}, {"conv1": 16}))
    with pytest.raises(PruneError, match="does not fit the plan"):
        rebuild(model, Plan({"conv1": (0,)}, {"conv1": 24}), model.state_dict())


class Scaled(nn.Module):
    """A learned factor per channel that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(1, 8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head((self.conv(images) * self.gain).relu().mean((2, 3)))


def test_what_stands_in_the_way_is_named():
    """A parameter by its name; a trace that fails by the layer before the operation that is not understood."""
    channels = trace_groups(Scaled().eval(), torch.randn(1, 3, 8, 8))
    assert channels.group("conv").protected == "it runs through gain, whose channels cannot be cut one by one"
    with pytest.raises(PruneError, match=r"could not be traced after stages\.1\.blocks\.0\S+: ZeroDivisionError"):
        trace_groups(models.create("shvit_s1", 10, 3).eval(), torch.randn(1, 3, 224, 224))


class Moving(nn.Module):
    """Two convolutions with something between them that moves channels by their place."""

    def __init__(self, move, wide: int = 8):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(wide, 6, 3, padding=1), nn.Linear(6, 5)
        self.move = move

    def forward(self, x):
        x = self.move(torch.relu(self.norm(self.first(x))))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def middle(x):
    return torch.cat([x[:, :4].flip(1), x[:, 4:]], 1)


MOVES = {
    "roll": (lambda x: torch.roll(x, 1, 1), 8),
    "pad": (lambda x: nn.functional.pad(x, (0, 0, 0, 0, 2, 2)), 12),
    "flip": (lambda x: x.flip(1), 8),
    "half flipped": (middle, 8),
}


@pytest.mark.parametrize("name", MOVES)
def test_channels_that_are_moved_by_their_place_are_left_alone(name):
    torch.manual_seed(0)
    channels = trace_groups(Moving(*MOVES[name]).eval(), torch.randn(1, 3, 8, 8))
    assert channels.group("first").protected
    assert not channels.group("second").protected, channels.group("second").protected


def test_a_branch_that_begins_at_zero_hides_nothing():
    """A zero-initialised norm behind a rolled branch: fresh weights say nothing of what runs before it."""

    class Branch(Moving):
        def __init__(self):
            super().__init__(lambda x: torch.roll(x, 1, 1))
            self.shut = nn.BatchNorm2d(6)
            nn.init.zeros_(self.shut.weight)
            self.past = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            y = self.shut(self.second(self.move(torch.relu(self.norm(self.first(x))))))
            return self.head((y + self.past(x)).mean((2, 3)))

    torch.manual_seed(0)
    channels = trace_groups(Branch().eval(), torch.randn(1, 3, 8, 8))
    assert "mixed or moved" in channels.group("first").protected


@pytest.mark.parametrize("kind", ["tuple", "dict", "list", "auxiliary"])
def test_channels_that_reach_any_output_keep_their_width(kind):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)
            self.head, self.aux = nn.Linear(6, 5), nn.Linear(8, 5)

        def forward(self, x):
            a = torch.relu(self.one(x))
            b = torch.relu(self.two(a))
            y = self.head(torch.relu(self.three(b)).mean((2, 3)))
            if kind == "auxiliary":
                return (y, self.aux(b.mean((2, 3)))) if self.training else y
            return {"tuple": (y, b), "dict": {"logits": y, "features": b}, "list": [b, y]}[kind]

    torch.manual_seed(0)
    channels = trace_groups(Several().eval(), torch.randn(1, 3, 10, 10))
    assert channels.group("two").protected
    assert channels.group("head").protected == "its channels are the network's outputs"
    assert {group.name for group in channels.free} == {"one", "three"}
    small = tiny.cut(Several().eval(), channels, Plan.from_kept(channels, {g.name: [0, 2] for g in channels.free}))
    small.train()(torch.randn(2, 3, 10, 10))


def test_a_weight_that_two_layers_share_stays_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
            self.three.weight = self.two.weight
            self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

        def forward(self, x):
            x = self.three(torch.relu(self.two(torch.relu(self.one(x)))))
            return self.head(torch.relu(self.last(torch.relu(x))).mean((2, 3)))

    from dist_prune.pruning.selection import cost

    model = Tied().eval()
    channels = trace_groups(model, torch.randn(1, 3, 12, 12))
    for name in ("one", "two", "three"):
        assert "three and two share one weight" in channels.group(name).protected
    assert [group.name for group in channels.free] == ["last"]
    small = tiny.cut(model, channels, Plan({"last": (0, 1)}, {g.name: g.width for g in channels.groups}))
    assert cost.params(channels) == sum(p.numel() for p in model.parameters())
    assert cost.params(channels, {"last": 4}) == sum(p.numel() for p in small.parameters())
    assert small.two.weight is small.three.weight


def test_layers_called_by_keyword_and_computed_weights():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, *, images):
            return torch.relu(self.conv(input=images))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = nn.Conv2d(3, 8, 3), Block()
            self.last = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1))
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            x = self.block(images=torch.relu(self.first(x)))
            return self.head(torch.relu(self.last(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(1, 3, 12, 12)
    channels = trace_groups(model, x)
    assert "is computed from other parameters" in channels.group("last").protected
    assert not channels.group("first").protected
    with gate_off(model, channels, {"first": [1]}):
        expected = model(x)
    small = tiny.cut(model, channels, Plan({"first": (1,)}, {g.name: g.width for g in channels.groups}))
    assert torch.allclose(small(x), expected, atol=1e-6)


def test_a_reason_is_true():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 6, 1), nn.Linear(6, 5)

        def forward(self, x):
            x = torch.relu(self.first(x)).repeat_interleave(2, 1)
            return self.head(torch.relu(self.second(x)).mean((2, 3)))

    channels = trace_groups(Repeated().eval(), torch.randn(1, 3, 12, 12))
    assert "outputs" not in channels.group("first").protected
    assert channels.group("first").protected


def test_another_image_size_names_the_key():
    model = models.create("deit_tiny_patch16_224", 10, 3, kwargs={"depth": 1}).eval()
    with pytest.raises(PruneError, match=r"backbone.kwargs=\{img_size: 96\}"):
        trace_groups(model, torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize(
    "name", ["mobileone_s0", "repvgg_a0", "fastvit_t8", "repghostnet_050", pytest.param("ghostnetv3_050", marks=SLOW)]
)
def test_a_pruned_block_can_be_fused(name):
    """timm's reparameterize_model reads counts that the blocks keep beside their layers."""
    from timm.utils.model import reparameterize_model

    torch.manual_seed(0)
    model, x = models.create(name, 10, 3).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        channels = trace_groups(model, x[:1])
        widths = {group.name: group.width for group in channels.groups}
        free = [group for group in channels.free if group.width >= 4]
        plan = Plan({group.name: tuple(range(0, group.width, 4)) for group in free}, widths)
        surgeon.apply_plan(model, channels, plan)
        rebuilt = rebuild(models.create(name, 10, 3), plan, model.state_dict()).eval()
        expected = model(x)
        for small in (model, rebuilt):
            found = reparameterize_model(small)(x)
            assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
