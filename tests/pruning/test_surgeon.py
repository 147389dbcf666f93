"""Groups, protection, surgery and rebuilding on timm's networks and on odd ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dist_prune.bench import Bench
from dist_prune.errors import PruneError
from dist_prune.pruning import surgeon
from dist_prune.pruning.choose import Request
from dist_prune.pruning.gates import gated
from dist_prune.pruning.plan import Plan
from dist_prune.runtime import backbones
from dist_prune.runtime.data.feed import Feed, Look
from dist_prune.runtime.data.sources import open_source
from dist_prune.runtime.tracking import Tracker
from tests import tiny

SLOW = pytest.mark.slow
TIMM = ["resnet18", "mobilenetv2_100", pytest.param("densenet121", marks=SLOW), pytest.param("vgg16_bn", marks=SLOW)]


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_are_scored_pruned_and_run(name, data):
    """The recipe's own path on real ImageNet images: hashes, plan, surgery, forward, rebuild, gates."""
    torch.manual_seed(0)
    model = backbones.create(name, 1000, 3).eval()
    source = open_source("imagefolder", str(data / "imagenet_1000"), "val", True)
    feed = Feed(source, Look(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875), torch.device("cpu"))
    channels = surgeon.sites_of(model, torch.randn(1, 3, 64, 64))
    bench = Bench(model, channels, feed, np.arange(4), tiny.machine(), Tracker(False), micro_batch=4)
    method = tiny.method("graph")
    scores = method.score(bench)
    plan = method.select(scores, channels, Request(target=("macs", 0.7)))
    images = next(feed.batches([bench.ids])).images
    with gated(model, channels, plan.removed), torch.no_grad():
        expected = model(images)
    surgeon.operate(model, channels, plan)
    with torch.no_grad():
        found = model(images)
    rebuilt = surgeon.rebuild(backbones.create(name, 1000, 3), plan, model.state_dict()).eval()
    assert len(channels.free) > 10
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    with torch.no_grad():
        assert torch.equal(rebuilt(images), found)


def test_option_a_protects_streams_stem_and_head():
    channels = surgeon.sites_of(backbones.create("resnet20_cifar", 10, 3).eval(), torch.randn(1, 3, 32, 32))
    assert [group.name for group in channels.free] == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]
    stem = channels.group("conv1")
    assert {"conv1", "layer1.0.conv2", "layer3.2.conv2"} <= set(stem.producers)
    assert "16, 32, 64 channels wide" in stem.protected
    assert channels.group("linear").protected == "its channels are the network's outputs"


def test_projection_form_has_three_streams_led_by_stem_and_shortcuts():
    channels = surgeon.sites_of(backbones.create("resnet20p_cifar", 10, 3).eval(), torch.randn(1, 3, 32, 32))
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
    channels = surgeon.sites_of(model, x[:1])
    reasons = {group.name: group.protected for group in channels.groups}
    assert reasons["one"] == "it has a single channel"
    assert channels.group("first").unit == "conv group"
    assert channels.group("first").width == 2
    assert "norm" in reasons["hidden"]
    assert not reasons["last"]
    plan = Plan.keeping(channels, {group.name: [1, 3] if group.width > 2 else [1] for group in channels.free})
    with gated(model, channels, plan.removed):
        expected = model(x)
    small = tiny.cut(model, channels, plan)
    assert torch.allclose(small(x), expected, atol=1e-5)
    assert small.hidden.in_features == 2 * 16


def test_layers_used_twice_and_half_depthwise_are_counted_right():
    import thop

    from dist_prune.pruning import cost

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
    channels = surgeon.sites_of(model, x)
    plan = Plan.keeping(channels, {group.name: [0, 1] for group in channels.free})
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
        surgeon.sites_of(Broken(), torch.randn(1, 3, 4, 4))


def test_tracing_leaves_the_model_alone():
    model = tiny.network().train()
    before = copy.deepcopy(model.state_dict())
    surgeon.sites_of(model, tiny.example()[:1])
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


def test_a_plan_of_another_network_is_refused():
    model = tiny.network()
    channels = surgeon.sites_of(model, tiny.example()[:1])
    with pytest.raises(PruneError, match="belongs to another network"):
        surgeon.operate(model, channels, Plan({"conv1": (0,)}, {"conv1": 16}))
    with pytest.raises(PruneError, match="does not fit the plan"):
        surgeon.rebuild(model, Plan({"conv1": (0,)}, {"conv1": 24}), model.state_dict())


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
    channels = surgeon.sites_of(Scaled().eval(), torch.randn(1, 3, 8, 8))
    assert channels.group("conv").protected == "it runs through gain, whose channels cannot be cut one by one"
    with pytest.raises(PruneError, match=r"could not be traced behind stages\.1\.blocks\.0\S+: ZeroDivisionError"):
        surgeon.sites_of(backbones.create("shvit_s1", 10, 3).eval(), torch.randn(1, 3, 224, 224))
