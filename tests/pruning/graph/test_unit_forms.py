"""Whole units by class: heads, pairs and head positions of many families, gated, cut, counted and loaded again."""

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, GluMlp
from timm.models.eva import Eva
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from dist_prune import models
from dist_prune.pruning.graph.groups import DependencyGraph, Units
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.surgeon import prune_tensors_like
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.library_context import check_same_network
from tests.support import tiny

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4}
PVT = {"depths": (1, 1, 1), "embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "mlp_ratios": (2, 2, 2),
       "sr_ratios": (4, 2, 1)}  # fmt: skip
MAX = {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64), "stem_width": 8}
# name, arguments, side of the image, what has to be free beside channels: leader -> (unit, width)
FAMILIES: dict[str, tuple[str, dict[str, Any], int, dict[str, tuple[str, int]]]] = {
    "eva02": ("eva02_tiny_patch14_224", {**VIT, "img_size": 28}, 28,
              {"blocks.0.attn.qkv": ("head", 4), "blocks.1.mlp.fc1": ("pair", 85)}),
    "eva02 with norms": ("eva02_base_patch14_224", {**VIT, "img_size": 28}, 28, {"blocks.0.attn.q_proj": ("head", 4)}),
    "eva": ("eva_giant_patch14_224", {**VIT, "img_size": 28, "mlp_ratio": 2}, 28, {"blocks.0.attn.qkv": ("head", 4)}),
    "dinov3": ("vit_small_patch16_dinov3", {**VIT, "img_size": 32}, 32, {"blocks.1.attn.qkv": ("head", 4)}),
    "perception": ("vit_pe_core_tiny_patch16_384", {**VIT, "img_size": 32}, 32,
                   {"blocks.0.attn.qkv": ("head", 4), "attn_pool.q": ("head", 8)}),
    "beit": ("beit_base_patch16_224", {**VIT, "img_size": 32}, 32, {"blocks.1.attn.qkv": ("head", 4)}),
    "pvt": ("pvt_v2_b0", PVT, 64, {"stages.1.blocks.0.attn.q": ("head", 2), "stages.2.blocks.0.attn.q": ("head", 4)}),
    "pvt linear": ("pvt_v2_b2_li", PVT, 64, {"stages.2.blocks.0.attn.q": ("head", 4)}),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 8, "num_heads": 2, "stages": (1, 1, 1, 1)}, 64,
              {"blocks.0.attn.qkv": ("head", 2), "blocks.2.attn.qkv": ("head", 8)}),
    "maxvit": ("maxvit_tiny_tf_224", MAX, 64, {"stages.1.blocks.0.attn_grid.attn.qkv": ("head", 2)}),
    "maxvit with tables": ("maxvit_pico_rw_256", MAX, 64, {"stages.1.blocks.0.attn_block.attn.qkv": ("head", 2)}),
    "maxvit with perceptrons": ("maxvit_rmlp_pico_rw_256", MAX, 64,
                                {"stages.1.blocks.0.attn_block.attn.qkv": ("head", 2)}),
    "coatnet": ("coatnet_pico_rw_224", {**MAX, "depths": (1, 2), "block_type": ("C", "T")}, 64,
                {"stages.1.blocks.1.attn.qkv": ("head", 2)}),
    "sknet": ("skresnet18", {}, 64, {"layer2.0.conv1.paths.0.conv": ("channel", 128)}),
    "deepseek": ("deepseek_vit_412m", {"img_size": 84, "embed_dim": 32, "depth": 2, "num_heads": 2}, 84,
                 {"encoder.blocks.0.attn.qkv": ("head", 2), "encoder.blocks.1.mlp.fc1": ("pair", 88)}),
    "sam": ("samvit_base_patch16_224", {**VIT, "img_size": 32, "neck_chans": 16}, 32,
            {"blocks.1.attn.qkv": ("head", 4)}),
}  # fmt: skip
NARROW: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {**VIT, "patch_size": 4, "img_size": 8}, 8),
    "swin": ("swin_tiny_patch4_window7_224", {"patch_size": 1, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4),
                                              "window_size": 4, "img_size": 8}, 8),
    "beit": FAMILIES["beit"][:3],
    "dinov3": FAMILIES["dinov3"][:3],
    "torchvision": ("", {}, 16),
}  # fmt: skip


class Torchvisions(VisionTransformer):
    """torch's MultiheadAttention, as torchvision's networks have it."""

    def __init__(self) -> None:
        super().__init__(16, 8, 2, 4, 32, 48, num_classes=10)


def make(name: str, kwargs: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return (models.create(name, 10, 3, kwargs=kwargs) if name else Torchvisions()).double().eval()


def shaken(model: nn.Module) -> nn.Module:
    """Norms of ones, tables and biases of zeros: something has to depend on them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() < 2 or float(parameter.detach().std()) < 0.05:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(noise.to(parameter.dtype) * 0.2)
    return model


def some(graph: DependencyGraph, share: float = 0.5) -> Plan:
    """A plan without a random share of every free group."""
    removed = {}
    for group in graph.free:
        order = torch.randperm(group.width, generator=seeded_generator(1, group.name)).tolist()
        removed[group.name] = tuple(sorted(order[: max(1, int(group.width * share))]))
    return Plan(removed, {group.name: group.width for group in graph.groups})


def check_law(
    model: nn.Module, images: Tensor, graph: DependencyGraph, units: Units, streams: bool, shell: Any
) -> Plan:
    """Gated off is removed, arithmetic counts what is there, a second trace and a file agree."""
    assert cost.params(graph) == sum(p.numel() for p in model.parameters())
    plan = some(graph)
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(images)
    with torch.no_grad():
        assert not torch.allclose(expected, model(images), atol=1e-3)
    small = tiny.cut(model, graph, plan)
    with torch.no_grad():
        found = small(images)
    assert torch.allclose(found, expected, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) == cost.params(graph, plan.counts)
    again = trace_groups(small, images[:1], streams=streams, units=units)
    assert cost.macs(again) == cost.macs(graph, plan.counts)
    left = graph_after(graph, plan)
    assert {group.name: group.width for group in left.free} == {group.name: group.width for group in again.free}
    loaded = rebuild(shell, Plan.from_json(plan.to_json()), small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), found)
    loaded.train()(images).square().mean().backward()
    return plan


QUICK = ("eva02", "dinov3", "beit", "pvt", "hiera", "coatnet", "maxvit")  # without streams; with them the first two


def cases() -> list[Any]:
    out = []
    for number, which in enumerate((*QUICK, *sorted(set(FAMILIES) - set(QUICK)))):
        for streams in (False, True):
            quick = number < (2 if streams else len(QUICK)) or (which == "eva02 with norms" and streams)
            out.append(pytest.param(which, streams, marks=[] if quick else [pytest.mark.slow]))
    return out


def traced(model: Any, images: torch.Tensor, **options: Any) -> Any:
    """The graph of a network, whose outputs the trace leaves as they were."""
    with torch.no_grad():
        before = model(images)
    graph = trace_groups(model, images[:1], **options)
    with torch.no_grad():
        assert torch.allclose(model(images), before, atol=1e-12)
    return graph


@pytest.mark.parametrize(("which", "streams"), cases())
def test_whole_units_gated_off_are_removed(which, streams):
    name, kwargs, side, wanted = FAMILIES[which]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model, images = shaken(make(name, kwargs)), torch.randn(2, 3, side, side, dtype=torch.float64)
    graph = traced(model, images, streams=streams, units="whole")
    free = {group.name: (group.unit, group.width) for group in graph.free}
    assert wanted.items() <= free.items()
    check_law(model, images, graph, "whole", streams, make(name, kwargs))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("which", NARROW)
def test_head_positions_gated_off_are_removed(which, streams):
    """Queries lose what keys lose, and the scale of their product stays; turned queries keep all positions."""
    name, kwargs, side = NARROW[which]
    model, images = shaken(make(name, kwargs)), torch.randn(2, 3, side, side, dtype=torch.float64)
    graph = traced(model, images, streams=streams, units="head_width")
    positions = {group.name.rpartition(".")[2] for group in graph.free if group.unit == "head position"}
    assert positions == ({"v"} if which == "dinov3" else {"qk", "v"})
    check_law(model, images, graph, "head_width", streams, make(name, kwargs))


def test_a_norm_of_queries_keeps_their_positions_and_says_so():
    model = make("vit_tiny_patch16_224", {**NARROW["vit"][1], "qk_norm": True})
    graph = trace_groups(model, torch.randn(1, 3, 8, 8, dtype=torch.float64), units="head_width")
    assert "norm of each head's queries" in graph.group("blocks.0.attn.qk").protected
    assert not graph.group("blocks.0.attn.v").protected


def test_a_norm_over_all_heads_is_cut_with_streams_only():
    kwargs = {**NARROW["vit"][1], "scale_attn_norm": True}
    model, images = shaken(make("vit_tiny_patch16_224", kwargs)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert not [g for g in trace_groups(model, images[:1], units="whole").free if g.unit == "head"]
    graph = trace_groups(model, images[:1], streams=True, units="whole")
    assert [group.width for group in graph.free if group.unit == "head"] == [4, 4]
    check_law(model, images, graph, "whole", True, make("vit_tiny_patch16_224", kwargs))
    graph = trace_groups(shaken(make("vit_tiny_patch16_224", kwargs)), images[:1], units="head_width")
    assert "it runs through blocks.0.attn.norm" in graph.group("blocks.0.attn.v").protected


@pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(Eva).parameters, reason="this timm's EVA has as many keys as queries"
)
def test_heads_that_share_keys_and_values_go_together():
    """Grouped queries: a unit is a key and a value with all queries that read them. A gate goes with its heads."""

    def make_eva() -> nn.Module:
        torch.manual_seed(0)
        return Eva(
            img_size=32, patch_size=16, num_classes=10, embed_dim=32, depth=2, num_heads=8, num_kv_heads=4,
            attn_type="rope", qkv_fused=False, use_rot_pos_emb=True,
        ).double().eval()  # fmt: skip

    model, images = shaken(make_eva()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = trace_groups(model, images[:1], units="whole")
    heads = [group for group in graph.free if group.unit == "head"]
    assert [(group.width, group.per_channel[group.name, "out"]) for group in heads] == [(4, 8), (4, 8)]
    plan = check_law(model, images, graph, "whole", False, make_eva())
    attention: Any = tiny.cut(model, graph, plan).get_submodule("blocks.0.attn")
    assert (attention.num_heads, attention.num_kv_heads, attention.kv_dim) == (4, 2, 8)


class GatedAttention(nn.Module):
    """timm's attention with a gate beside its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 16, 4, 4), Attention(16, 4, qkv_bias=True, gated=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        return self.head((x + self.attn(x)).mean(1))


@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_gated_attention_loses_gates_with_heads(units):
    torch.manual_seed(0)
    model, images = GatedAttention().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = trace_groups(model, images[:1], units=units)
    assert len([group for group in graph.free if "attn.gate" in group.producers]) == 1
    check_law(model, images, graph, units, False, GatedAttention().double())


class Gated(nn.Module):
    """A gated perceptron of 1x1 convolutions."""

    def __init__(self, last: bool):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 10)
        self.mlp = GluMlp(6, 16, use_conv=True, gate_last=last)

    def forward(self, images):
        x = self.stem(images)
        return self.head((x + self.mlp(x)).mean((2, 3)))


@pytest.mark.parametrize("last", [False, True])
def test_pairs_of_convolutions(last):
    torch.manual_seed(0)
    model, images = shaken(Gated(last).double().eval()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = trace_groups(model, images[:1], units="whole")
    assert (graph.group("mlp.fc1").unit, graph.group("mlp.fc1").width) == ("pair", 8)
    check_law(model, images, graph, "whole", False, Gated(last).double())
    request = SelectionRequest(min_channels=4, round_to=4)
    assert request.width(graph.group("mlp.fc1"), 1) == 4  # pairs are rounded like channels


@pytest.mark.parametrize("which", ["eva02", "beit", "maxvit", "pvt"])
def test_earlier_units_stay_as_they_were(which):
    """Without the option nothing else is found, and no module gets another class."""
    name, kwargs, side, wanted = FAMILIES[which]
    model = make(name, kwargs)
    classes = [type(module) for module in model.modules()]
    graph = trace_groups(model, torch.randn(1, 3, side, side, dtype=torch.float64))
    assert not wanted.items() & {group.name: (group.unit, group.width) for group in graph.groups}.items()
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("units", ["whole", "head_width"])
@pytest.mark.parametrize("which", ["eva02", "beit", "torchvision"])
def test_another_copy_of_the_network_can_be_gated_and_its_states_be_cut(which, units):
    """A graph serves every copy of its network: one that was not traced calls its layers when it is needed."""
    name, kwargs, side = FAMILIES[which][:3] if name_of(which) else NARROW[which]
    model, images = shaken(make(name, kwargs)), torch.randn(2, 3, side, side, dtype=torch.float64)
    other = copy.deepcopy(model)
    graph = trace_groups(model, images[:1], units=units)
    plan = some(graph)
    check_same_network(other, graph, tiny.machine().comm)
    with torch.no_grad(), gate_off(other, graph, plan.removed):
        expected = other(images)
    assert torch.allclose(tiny.cut(other, graph, plan)(images), expected, atol=1e-9)
    small = tiny.cut(shaken(make(name, kwargs)), graph, plan)  # never traced, never gated
    assert torch.allclose(small(images), expected, atol=1e-9)
    moments = {name: torch.rand_like(parameter) for name, parameter in model.named_parameters()}
    cut = prune_tensors_like(model, graph, plan, moments)
    assert {name: tensor.shape for name, tensor in cut.items()} == {n: p.shape for n, p in small.named_parameters()}


def name_of(which: str) -> bool:
    return which in FAMILIES


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "taylor", "group_norm", "random", "reconstruction"])
@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_criteria_score_units(name, units):
    """A criterion of what layers read leaves queries and keys alone: no layer reads them."""
    torch.manual_seed(0)
    model = models.create("beit_base_patch16_224", 10, 1, kwargs={**VIT, "img_size": 8, "patch_size": 4})
    bench = tiny.bench(shaken(model.double().eval()), images=14, units=units)
    method = tiny.method(name)
    bench.graph = channels = method.prunable(bench.graph)
    plan = method.select(method.score(bench), channels, SelectionRequest(keep_ratio=0.5))
    cuts = [group for group in channels.free if group.unit in ("head", "head position")]
    assert len(cuts) == (2 if units == "whole" or name == "reconstruction" else 4)
    assert all(len(plan.removed[group.name]) == group.width // 2 for group in cuts)


@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_ranks_agree_on_units(pool, units):
    one = fingerprint(None, units)
    assert pool.run(2, fingerprint, units) == [one, one]


def fingerprint(ranks: Any, units: Units) -> str:
    torch.manual_seed(0)
    model = models.create("vit_tiny_patch16_224", 10, 1, kwargs={**VIT, "img_size": 8, "patch_size": 4})
    bench = tiny.bench(model.double().eval(), ranks, images=21, units=units)
    method = tiny.method("taylor")
    return method.select(method.score(bench), bench.graph, SelectionRequest(target=("macs", 0.6))).fingerprint
