"""What the graph authors' programs do differently, as named quirks; and the rule for networks they never saw."""

import copy

import pytest
import torch

from dist_prune import models
from dist_prune.data.loader import ImageLoader
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.graph.method import Graph, HashAgreement, Options
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.hooks.statistics import Accumulator
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.reinit import reinitialise
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny


def method(**options) -> Graph:
    return Graph(Options(**options))


def augmented_feed() -> ImageLoader:
    feed = tiny.digits_feed()
    return ImageLoader(
        feed.source, feed.transform.__class__(8, (0.3,), (0.4,), augment="crop"), feed.device, 0, feed.dtype
    )


def released_plan(ranks: Communicator) -> str:
    model = tiny.network()
    context = tiny.bench(model, ranks, augmented_feed())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = method(fidelity="as_released")
    plan = found.select(found.score(context), context.graph, SelectionRequest(threshold=0.7))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not model.training
    return plan.fingerprint


def test_the_released_form_is_the_same_for_every_number_of_ranks(pool):
    plans = {plan for world in (1, 2, 3) for plan in pool.run(world, released_plan)}
    assert len(plans) == 1


def test_train_mode_is_one_batch_in_training_mode():
    """Against the network itself, in train(), on all images at once."""
    model = tiny.network()
    context = tiny.bench(model)
    scores = method(quirks=["train_mode"]).score(context)
    point = next(point for point in context.hook_points if point.name == "layer2.0.conv1")
    maps = {}
    own = copy.deepcopy(model).train()
    own.get_submodule(point.name).register_forward_hook(lambda m, i, y: maps.update(y=y))
    with torch.no_grad():
        own(next(context.loader.batches([context.ids])).images)
    accumulator = Accumulator(HashAgreement(8), [point], context.images, torch.device("cpu"))
    accumulator.update(point, maps["y"], torch.arange(context.images))
    gram = accumulator.tables[point.name]["gram"]
    ones = gram.diagonal()
    assert torch.equal(scores[f"{point.name}:hamming"], ones[:, None] + ones[None] - 2 * gram)
    plain = method().score(context)
    assert not torch.equal(scores[f"{point.name}:hamming"], plain[f"{point.name}:hamming"])
    assert torch.equal(scores["conv1:hamming"], plain["conv1:hamming"]), "no batch norm comes before the stem"


def test_augmented_images_follow_the_seed():
    found = [
        method(quirks=["augmented"]).score(tiny.bench(tiny.network(), feed=augmented_feed(), seed=seed))[
            "conv1:hamming"
        ]
        for seed in (0, 0, 1)
    ]
    plain = method().score(tiny.bench(tiny.network(), feed=augmented_feed()))["conv1:hamming"]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], plain)


def test_as_released_is_the_second_release():
    assert [q for q in ("train_mode", "augmented") if method(fidelity="as_released").has(q)] == [
        "train_mode",
        "augmented",
    ]
    assert not method(fidelity="as_released").has("fresh_classifier")
    assert not any(method().has(q) for q in ("train_mode", "augmented", "narrow_classifier", "fresh_classifier"))


@pytest.fixture(scope="module")
def vgg():
    """The paper's VGG-16 with its channels and made-up scores."""
    torch.manual_seed(0)
    model = models.create("vgg16_bn_cifar", 10, 3).eval()
    graph = trace_groups(model, torch.randn(1, 3, 32, 32))
    scores = {}
    for point in graph.hook_points:
        if point.kind == "conv":
            generator = torch.Generator().manual_seed(point.width)
            table = torch.randint(0, 6400, (point.width, point.width), generator=generator).triu(1)
            scores[f"{point.name}:hamming"] = table + table.T
            scores[f"{point.name}:bits"] = torch.tensor([64, 100])
            scores[f"{point.name}:l1"] = torch.rand(point.width, generator=generator, dtype=torch.float64)
    return model, graph, scores


@pytest.mark.parametrize("quirks", [[], ["narrow_classifier"]])
def test_both_classifier_forms_of_vgg(vgg, quirks):
    """Second release: the hidden linear layer stays 512 wide. First one: it shrinks with the last convolution."""
    model, graph, scores = vgg
    found = method(quirks=quirks)
    plan = found.select(scores, graph, SelectionRequest(threshold=0.9))
    left = plan.counts["features.40"]
    assert 1 <= left < 512
    small = tiny.cut(model, found.prunable(graph), plan)
    hidden = small.get_submodule("hidden.0")
    assert (hidden.in_features, hidden.out_features) == (left, left if quirks else 512)
    assert small.get_submodule("head").in_features == hidden.out_features
    assert cost.params(graph, plan.counts) == sum(p.numel() for p in small.parameters())
    small(torch.randn(2, 3, 32, 32))
    if quirks:
        assert plan.kept("hidden.0") == plan.kept("features.40")
        assert plan.removed.keys() == {group.name for group in graph.free}


def test_the_first_release_draws_the_classifier_anew(vgg):
    model, graph, _ = vgg
    assert method().layers_to_reinit(graph) == ()
    fresh = method(quirks=["fresh_classifier"]).layers_to_reinit(graph)
    assert fresh == ("hidden.0", "head", "hidden.1")
    one, two, other = (copy.deepcopy(model) for _ in range(3))
    state = torch.get_rng_state()
    for network, seed in ((one, 0), (two, 0), (other, 1)):
        reinitialise(network, fresh, seed)
    assert torch.equal(state, torch.get_rng_state())
    for key, tensor in model.state_dict().items():
        assert torch.equal(one.state_dict()[key], two.state_dict()[key])
        assert torch.equal(tensor, one.state_dict()[key]) == key.startswith(("features", "hidden.1"))
    assert not torch.equal(one.state_dict()["head.weight"], other.state_dict()["head.weight"])
    assert float(one.state_dict()["head.weight"].abs().max()) <= 512**-0.5


def test_training_mode_refuses_what_no_batch_can_hold():
    context = tiny.bench(tiny.network(), images=1347)
    with pytest.raises(PruneError, match=r"score\.images.* all images as one batch"):
        method(quirks=["train_mode"]).score(context)


def test_an_unknown_quirk_is_refused():
    with pytest.raises(ValueError, match="train_mode"):
        method(quirks=["trian_mode"])


def portrait_facts(request_: SelectionRequest) -> list[tuple[str, int, str]]:
    context = tiny.bench(tiny.network())
    found = method()
    scores = found.score(context)
    plan = found.select(scores, context.graph, request_)
    out = []
    for portrait in found.similarity_maps(scores, context.graph, request_):
        assert [i for i, stays in enumerate(portrait.kept) if stays] == plan.kept(portrait.group)
        assert portrait.similarity.shape == (len(portrait.kept),) * 2
        assert (portrait.similarity.diagonal() == 1).all()
        out.append((portrait.group, int(portrait.kept.sum()), portrait.caption))
    assert [group.name for group in found.prunable(context.graph).free] == [name for name, _, _ in out]
    return out


def test_portraits_show_the_plan():
    for request_ in (SelectionRequest(threshold=0.7), SelectionRequest(target=("macs", 0.5))):
        portrait_facts(request_)
    assert "at similarity 0.7 " in portrait_facts(SelectionRequest(threshold=0.7))[0][2]


PAPER = [
    "vgg16_bn_cifar",
    "resnet20p_cifar",
    "densenet40_cifar",
    "googlenet_cifar",
    "mobilenetv1_cifar",
    "mobilenetv2_cifar",
]


@pytest.mark.parametrize("name", PAPER)
def test_zeroed_channels_are_removed_channels_in_the_paper_s_networks(name):
    """Specification, section 12.6: the batch norm's shift goes with the channel."""
    torch.manual_seed(0)
    model = models.create(name, 10, 3).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    graph = method().prunable(trace_groups(model, x))
    generator = torch.Generator().manual_seed(1)
    kept = {g.name: torch.randperm(g.width, generator=generator)[: g.width // 2].tolist() for g in graph.free}
    plan = Plan.from_kept(graph, kept)
    with torch.no_grad():
        with gate_off(model, graph, plan.removed):
            switched = model(x)
        removed = tiny.cut(model, graph, plan)(x)
    assert torch.allclose(switched, removed, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(switched, model(x))


FOREIGN = ["resnet18", "resnext50_32x4d", "mobilenetv3_small_100", "efficientnet_b0", "regnety_002", "convnext_atto",
           "ghostnet_100", "dla34", "hrnet_w18_small", "repvgg_a0", "inception_v3", "densenet121"]  # fmt: skip


@pytest.mark.parametrize(
    "name", [*FOREIGN[:5], *(pytest.param(other, marks=pytest.mark.slow) for other in FOREIGN[5:])]
)
def test_in_any_network_every_layer_leads_follows_or_has_a_reason(name):
    """The same rule everywhere: the leader is scored, no other layer of its group comes before it, the rest follow."""
    model = models.create(name, 10, 3).eval()
    graph = method().prunable(trace_groups(model, torch.randn(1, 3, 96, 96)))
    seen = set()
    for group in graph.groups:
        assert group.producers[0] == group.name
        leader = graph.layers[group.name]
        if group.protected:
            assert len(group.protected) > 10
        else:
            assert leader.kind == "conv"
            assert leader.positions > 1
            assert group.width == leader.width_out
        seen |= set(group.layers)
    worked = {layer.name for layer in graph.layers.values() if layer.kind in ("conv", "linear")}
    assert worked <= seen, "every convolution and linear layer lies in a group"


def test_a_layer_that_cannot_be_hashed_says_why():
    graph = method().prunable(trace_groups(models.create("mobilenetv3_small_100", 10, 3).eval(),
                                                torch.randn(1, 3, 96, 96)))  # fmt: skip
    assert graph.group("blocks.0.0.se.conv_reduce").protected == "its 1x1 maps carry no hash"
    with pytest.raises(PruneError, match="either select"):
        method().check(graph, SelectionRequest())
