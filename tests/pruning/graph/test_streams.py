"""Residual streams behind norms over channels and bare parameters: gated, cut, counted and loaded again."""

from typing import Any

import pytest
import torch
from timm.layers import norm, norm_act
from torch import Tensor, nn

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.gating import gate, gate_off, gate_points
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.removal_order import structure
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny
from tests.support.gate_gradients import check_gate_of_ones

VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "img_size": 8}
SWIN = {"patch_size": 1, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 8}
NEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
FORMER = {"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 16, 16), "mlp_ratios": 2}
# name, arguments, side of the image, leaders of the streams that have to be free
FAMILIES: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "vit": ("vit_tiny_patch16_224", VIT, 8, ("patch_embed.proj",)),
    "deit": ("deit_tiny_distilled_patch16_224", VIT, 8, ("patch_embed.proj",)),
    "registers": ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 2}, 8, ("patch_embed.proj",)),
    "deit3": ("deit3_small_patch16_224", VIT, 8, ("patch_embed.proj",)),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 8, ("patch_embed.proj", "layers.1.downsample.reduction")),
    "convnext": ("convnext_atto", NEXT, 32, ("stem.0", "stages.1.downsample.1", "stages.3.downsample.1")),
    "mobilevit": ("mobilevit_xxs", {}, 64, ("stages.2.1.conv_1x1", "stages.3.1.conv_1x1", "stages.4.1.conv_1x1")),
    "efficientformer": ("efficientformer_l1", FORMER, 224, ("stem.conv2", "stages.3.downsample.conv")),
    "vit_rms": ("vit_tiny_patch16_224", {**VIT, "norm_layer": "rmsnorm"}, 8, ("patch_embed.proj",)),
    "next_rms": ("convnext_atto", {**NEXT, "norm_layer": "rmsnorm2d"}, 32, ("stem.0", "stages.1.downsample.1")),
}


def network(which: str) -> tuple[nn.Module, Tensor]:
    name, kwargs, side, _ = FAMILIES[which]
    torch.manual_seed(0)
    model = models.create(name, 10, 3, kwargs=kwargs).double()
    for parameter in model.parameters():  # norms of ones, tokens of zeros: something has to depend on them
        if parameter.dim() < 2 or float(parameter.detach().std()) < 0.05:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval(), torch.randn(2, 3, side, side, dtype=torch.float64)


def some(graph: DependencyGraph, share: float = 0.4) -> Plan:
    """A plan without a random share of every free group."""
    removed = {}
    for group in graph.free:
        order = torch.randperm(group.width, generator=seeded_generator(1, group.name)).tolist()
        removed[group.name] = tuple(sorted(order[: max(1, int(group.width * share))]))
    return Plan(removed, {group.name: group.width for group in graph.groups})


@pytest.mark.parametrize("which", FAMILIES)
def test_gated_off_is_removed(which):
    """The norms compute over the channels that are left, the arithmetic counts them, the file loads without a trace."""
    model, images = network(which)
    graph = trace_groups(model, images[:1], streams=True)
    assert set(FAMILIES[which][3]) <= {group.name for group in graph.free}
    assert cost.params(graph) == sum(p.numel() for p in model.parameters())
    plan = some(graph)
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(images)
    small = tiny.cut(model, graph, plan)
    with torch.no_grad():
        found = small(images)
        assert not torch.allclose(found, model(images))
    assert torch.allclose(found, expected, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) == cost.params(graph, plan.counts)
    again = trace_groups(small, images[:1], streams=True)
    assert cost.macs(again) == cost.macs(graph, plan.counts)
    left = graph_after(graph, plan)
    assert {group.name: group.width for group in left.free} == {group.name: group.width for group in again.free}
    shell = models.create(FAMILIES[which][0], 10, 3, kwargs=FAMILIES[which][1]).double()
    loaded = rebuild(shell, Plan.from_json(plan.to_json()), small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), found)
    loaded.train()(images).square().mean().backward()


@pytest.mark.parametrize("which", ["deit", "swin", "convnext"])
def test_streams_stay_whole_unless_asked_for(which):
    model, images = network(which)
    graph = trace_groups(model, images[:1])
    assert not set(FAMILIES[which][3]) & {group.name for group in graph.free}
    assert not [layer for layer in graph.layers.values() if layer.kind in ("layer norm", "parameter")]


class Normed(nn.Module):
    """A residual stream behind a norm, with a parameter whose channels are not on its last axis."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 16, 1)
        self.norm, self.places = norm, nn.Parameter(torch.randn(1, 16, 6, 6))
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        x = self.stem(images) + self.places
        x = x + self.two(self.one(self.norm(x)).relu())
        return self.head(self.norm(x).mean((2, 3)))


FORMS = {
    "group norm": (lambda: nn.GroupNorm(4, 16), "conv group", 4),
    "group norm of one group": (lambda: nn.GroupNorm(1, 16), "channel", 16),
    "without scale": (lambda: nn.GroupNorm(1, 16, affine=False), "channel", 16),
    "layer norm of maps": (lambda: norm.LayerNorm2d(16), "channel", 16),
    "layer norm with an activation": (lambda: norm_act.LayerNormAct2d(16), "channel", 16),
    "root mean square of maps": (lambda: norm.RmsNorm2d(16), "channel", 16),
}


@pytest.mark.parametrize("form", FORMS)
def test_norms_over_maps(form):
    """A group norm loses whole groups; every other norm single channels. A norm may run twice."""
    make, unit, width = FORMS[form]
    torch.manual_seed(0)
    model = Normed(make()).double().eval()
    for parameter in model.norm.parameters():
        parameter.data.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = trace_groups(model, images[:1], streams=True)
    stream = graph.group("stem")
    assert (stream.protected, stream.unit, stream.width) == ("", unit, width)
    plan = Plan({"stem": (0, 2), "one": (1, 5)}, {group.name: group.width for group in graph.groups})
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(images)
    small = tiny.cut(model, graph, plan)
    assert small.places.shape == (1, 16 - 2 * 16 // width, 6, 6)
    with torch.no_grad():
        assert torch.allclose(small(images), expected, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) == cost.params(graph, plan.counts)
    loaded = rebuild(Normed(make()).double().eval(), plan, small.state_dict())
    assert torch.equal(loaded(images), small(images))


def test_a_gate_of_ones_is_the_norm_and_gradients_flow_through_its_statistics():
    model, images = network("deit")
    graph = trace_groups(model, images[:1], streams=True)
    check_gate_of_ones(model, images, gate_points(graph, "patch_embed.proj"), "patch_embed.proj", 24)


def test_gates_of_a_row_per_coalition():
    """Coalitions run as parts of one batch, each with norms over its own channels."""
    model, images = network("convnext")
    graph = trace_groups(model, images[:1], streams=True)
    off = torch.zeros(2, 8, dtype=torch.bool)
    off[0, [1, 4]], off[1, [0, 2, 3]] = True, True
    with torch.no_grad():
        with gate(model, gate_points(graph, "stem.0"), {"stem.0": ~off}):
            both = model(torch.cat([images, images]))
        for part, row in zip(both.split(2), off, strict=True):
            with gate_off(model, graph, {"stem.0": row.nonzero().flatten().tolist()}):
                assert torch.allclose(part, model(images), atol=1e-10)


def test_groups_of_equal_structure_are_found_beside_streams():
    """Isomorphic ranking: streams, heads and hidden layers are sets of their own; stages of one depth are one set."""
    graph = trace_groups(*_traced("deit"), streams=True)
    sets: dict[object, set[str]] = {}
    for group in graph.free:
        sets.setdefault(structure(graph, group), set()).add(group.name)
    assert sorted(map(sorted, sets.values())) == [
        ["blocks.0.attn.qkv", "blocks.1.attn.qkv"],
        ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"],
        ["patch_embed.proj"],
    ]
    graph = trace_groups(*_traced("convnext"), streams=True)
    second, third = (graph.group(f"stages.{number}.downsample.1") for number in (1, 2))
    assert structure(graph, second) == structure(graph, third)
    assert structure(graph, second) != structure(graph, graph.group("stem.0"))


def _traced(which: str) -> tuple[nn.Module, Tensor]:
    model, images = network(which)
    return model, images[:1]


def test_a_plan_of_streams_needs_a_graph_with_streams():
    model, images = network("vit")
    graph = trace_groups(model, images[:1])
    plan = Plan({"patch_embed.proj": (0,)}, {group.name: group.width for group in graph.groups})
    with pytest.raises(PruneError, match=r"runs through pos_embed.*backbone.streams=true"):
        tiny.cut(model, graph, plan)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["ViT", "Dinov2", "CLIP", "Siglip", "DINOv3ViT"])
def test_heads_and_streams_of_transformers(name, attention):
    """Queries, keys and values are layers of their own.

    CLIP and SigLIP compute a pooled output that no classifier reads and tracing does not see: their streams stay. The
    stream of a bare DINOv3 is its output.
    """
    transformers = pytest.importorskip("transformers", minversion="5", exc_type=ImportError)
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
              "image_size": 8, "patch_size": 4, "attn_implementation": attention}  # fmt: skip
    if name in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{name}Config")(
            vision_config=vision, num_labels=10, attn_implementation=attention
        )
    else:
        config = getattr(transformers, f"{name}Config")(**vision, mlp_ratio=2, num_labels=10)
    kind = getattr(transformers, "DINOv3ViTModel" if name == "DINOv3ViT" else f"{name}ForImageClassification")
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() < 2 or float(parameter.detach().std()) < 0.05:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    images = torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images[:1], streams=True)
    heads = [group for group in graph.free if group.unit == "head"]
    assert [group.width for group in heads] == [4, 4]
    stream = max(graph.groups, key=lambda group: len(group.couplings))
    assert bool(stream.protected) == (name not in ("ViT", "Dinov2"))
    plan = some(graph)
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(images)[0]
    small = tiny.cut(model, graph, plan)
    with torch.no_grad():
        found = small(images)[0]
    assert torch.allclose(found, expected, atol=1e-4)
    assert cost.params(graph, plan.counts) == sum(parameter.numel() for parameter in small.parameters())
    loaded = rebuild(kind(config), plan, small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images)[0], found)
