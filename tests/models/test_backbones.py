"""The papers' networks: operations and parameters to the digit (redundancy-graph specification, section 7)."""

import pytest
import timm
import torch

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.methods.graph.method import Graph, Options
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery.verified_trace import trace_groups

# name, classes; millions as the table rounds them: thop, MACs of convolutions, MACs of linear layers; parameters
DENSE = [
    ("vgg16_bn_cifar", 10, "314.572", "313.197", "0.267", 14_991_946),
    ("vgg16_bn_cifar", 100, "314.618", "313.197", "0.313", 15_038_116),
    ("resnet20p_cifar", 10, "43.71", None, "0.001", 292_954),
    ("resnet32p_cifar", 10, "72.48", None, "0.001", 487_386),
    ("resnet44p_cifar", 10, "101.25", None, "0.001", 681_818),
    ("resnet56p_cifar", 10, "130.024", "127.844", "0.001", 876_250),
    ("resnet56p_cifar", 100, "130.030", "127.844", "0.006", 882_100),
    # the table says 259.491 and 259.496: the sums of its rounded parts; thop itself counts 259.490496 and 259.496256
    ("resnet110p_cifar", 10, "259.490", "255.246", "0.001", 1_751_194),
    ("resnet110p_cifar", 100, "259.496", "255.246", "0.006", 1_757_044),
    ("densenet40_cifar", 10, "292.502", "282.913", "0.005", 1_059_298),
    # the table says 292.544; thop itself counts 292.543464
    ("densenet40_cifar", 100, "292.543", "282.913", "0.046", 1_100_428),
    ("googlenet_cifar", 10, "1531.98", None, "0.010", 6_158_346),
    ("mobilenetv1_cifar", 10, "48.00", None, "0.010", 3_217_226),
    ("mobilenetv2_cifar", 10, "102.24", None, "0.013", 2_383_050),
]


def counts(name, classes, size=32):
    model = models.create(name, classes, 3).eval()
    return model, trace_groups(model, torch.randn(1, 3, size, size))


def millions(value: int, like: str) -> str:
    return f"{value / 1e6:.{len(like.split('.')[1])}f}"


def linear_macs(channels) -> int:
    layers = channels.layers.values()
    return sum(layer.width_in * layer.width_out for layer in layers if layer.kind == "linear")


@pytest.mark.parametrize(("name", "classes", "thop", "convolutions", "linear", "params"), DENSE)
def test_dense_counts_of_the_paper(name, classes, thop, convolutions, linear, params):
    _, channels = counts(name, classes)
    assert millions(cost.macs(channels, rule="thop"), thop) == thop
    assert cost.params(channels) == params
    assert millions(linear_macs(channels), linear) == linear
    if convolutions:
        assert millions(cost.macs(channels) - linear_macs(channels), convolutions) == convolutions


def test_dense_counts_of_the_paper_on_imagenet():
    _, channels = counts("resnet50", 1000, 224)
    assert millions(cost.macs(channels, rule="thop"), "4133.74") == "4133.74"
    assert millions(cost.macs(channels) - linear_macs(channels), "4087.14") == "4087.14"
    assert cost.params(channels) == 25_557_032


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16_bn", "vgg16_bn_pool7"])
def test_dense_counts_of_vgg_on_imagenet(name):
    _, channels = counts(name, 1000, 224)
    assert millions(cost.macs(channels, rule="thop"), "15524.5") == "15524.5"
    assert cost.params(channels) == 138_365_992


@pytest.mark.slow
def test_the_pooled_form_is_timm_s_network_at_224():
    """The same keys, the same outputs; at 448 the classifier sees 7x7 maps, not 8x8 places of 14x14."""
    torch.manual_seed(0)
    plain = timm.create_model("vgg16_bn", num_classes=3).eval()
    pooled = models.create("vgg16_bn_pool7", 3, 3).eval()
    pooled.load_state_dict(plain.state_dict())
    seen = {}
    pooled.get_submodule("pre_logits").register_forward_pre_hook(lambda m, x: seen.update(shape=x[0].shape))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(plain(x), pooled(x), atol=1e-5)
        pooled(torch.randn(1, 3, 448, 448))
    assert seen["shape"] == (1, 512, 7, 7)


@pytest.mark.parametrize("name", sorted({row[0] for row in DENSE}))
def test_timm_knows_them_and_they_have_no_weights_to_fetch(name):
    assert timm.is_model(name)
    model = timm.create_model(name, num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(PruneError, match="no weights to fetch"):
        models.create(name, 10, 3, pretrained=True)


def scored(name) -> dict[str, tuple[str, ...]]:
    """Scored layer -> the layers whose outputs follow it."""
    _, channels = counts(name, 10)
    return {group.name: group.producers[1:] for group in Graph(Options()).prunable(channels).free}


@pytest.mark.parametrize(
    ("name", "number"), [("vgg16_bn_cifar", 13), ("densenet40_cifar", 39), ("googlenet_cifar", 64)]
)
def test_every_convolution_is_scored_and_none_follows(name, number):
    _, channels = counts(name, 10)
    found = scored(name)
    assert list(found) == [layer.name for layer in channels.layers.values() if layer.kind == "conv"]
    assert len(found) == number
    assert not any(found.values())


@pytest.mark.parametrize("blocks", [3, 9, 18])
def test_residual_streams_follow_the_stem_and_the_projections(blocks):
    found = scored(f"resnet{6 * blocks + 2}p_cifar")
    leaders = {"conv1": 1, "layer2.0.downsample.0": 2, "layer3.0.downsample.0": 3}
    for leader, stage in leaders.items():
        assert found.pop(leader) == tuple(f"layer{stage}.{block}.conv2" for block in range(blocks))
    assert sorted(found) == sorted(f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(blocks))
    assert not any(found.values())


def test_the_bottleneck_s_last_convolution_follows_its_stage_s_projection():
    model = models.create("resnet50", 10, 3).eval()
    channels = Graph(Options()).prunable(trace_groups(model, torch.randn(1, 3, 64, 64)))
    found = {group.name: group.producers[1:] for group in channels.free}
    assert found.pop("conv1") == ()
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        assert found.pop(f"layer{stage}.0.downsample.0") == tuple(f"layer{stage}.{b}.conv3" for b in range(blocks))
        for block in range(blocks):
            assert found.pop(f"layer{stage}.{block}.conv1") == found.pop(f"layer{stage}.{block}.conv2") == ()
    assert not found


def test_depthwise_layers_and_projections_of_the_mobilenets_follow():
    _, channels = counts("mobilenetv1_cifar", 10)
    groups = {group.name: group.layers for group in channels.groups}
    assert list(scored("mobilenetv1_cifar")) == ["stem.0", *(f"blocks.{b}.3" for b in range(13))]
    assert "blocks.5.0" in groups["blocks.4.3"], "a depthwise layer follows its input"
    found = scored("mobilenetv2_cifar")
    strided = (3, 6, 13)
    expected = {"stem.0": (), "last.0": ()}
    for block in range(17):
        expected[f"blocks.{block}.expand.0"] = ()
        if block in strided:
            expected[f"blocks.{block}.project.0"] = ()
        else:
            expected[f"blocks.{block}.shortcut.0"] = (f"blocks.{block}.project.0",)
    assert found == expected


def test_a_concatenation_s_reader_takes_the_kept_sets_side_by_side():
    """DenseNet: the eleventh layer of a block reads the stem's and ten layers' channels, each at its own offset."""
    _, channels = counts("densenet40_cifar", 10)
    at = {}
    for group in channels.groups:
        for coupling in group.couplings:
            if (coupling.layer, coupling.side) == ("dense1.10.conv", "in"):
                at.update((i, (group.name, c)) for i, c in zip(coupling.index, coupling.channel, strict=True))
    names = ["conv", *(f"dense1.{layer}.conv" for layer in range(10))]
    assert [at[place] for place in range(144)] == [
        (name, channel) for name in names for channel in range(24 if name == "conv" else 12)
    ]


def test_mint_s_vgg_ends_in_a_max_pool():
    torch.manual_seed(0)
    model, x = models.create("vgg16_bn_maxpool_cifar", 10, 3).eval(), torch.randn(2, 3, 32, 32)
    maps = model.features(x)
    wanted = model.head(model.hidden(torch.nn.functional.max_pool2d(maps, 2).flatten(1)))
    assert torch.allclose(model(x), wanted, atol=1e-6)
    assert isinstance(model.hidden[1], torch.nn.BatchNorm1d)
    other = models.create("vgg16_bn_cifar", 10, 3)
    assert [(n, t.shape) for n, t in other.state_dict().items()] == [
        (n, t.shape) for n, t in model.state_dict().items()
    ]
