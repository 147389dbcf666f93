"""Residual blocks that go as a whole: found, ranked, removed, counted and loaded again."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from dist_prune import models
from dist_prune.analysis.ratio_curves import with_keep_ratios
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.export import bundle
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.saved_idxs import to_saved_idxs
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.cost import COSTS
from dist_prune.pruning.selection.ranking import SelectionRequest, hold_blocks, reachable, select_by_score
from dist_prune.pruning.surgery.activation_memory import measure_peak
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.residual_blocks import with_blocks
from dist_prune.pruning.surgery.surgeon import apply_plan, prune_tensors_like
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.block_change import block_changes
from dist_prune.scoring.context import DistributedScoringContext
from tests.support import tiny

CLASSES = tuple("0123456789")
VIT = {"patch_size": 4, "img_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
# name, arguments, side of the image, paths of the blocks that can go
FAMILIES: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "resnet": ("resnet20_cifar", {"img_size": 8}, 8,
               ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]),
    "vit": ("vit_tiny_patch16_224", VIT, 8, ["blocks.0", "blocks.1", "blocks.2"]),
    "mobilenetv2": ("mobilenetv2_050", {}, 32,
                    ["blocks.1.1", "blocks.2.1", "blocks.2.2", "blocks.3.1", "blocks.3.2", "blocks.3.3", "blocks.4.1",
                     "blocks.4.2", "blocks.5.1", "blocks.5.2"]),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 16)}, 32,
                 ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1",
                  "stages.3.blocks.0"]),
    "swin": ("swin_tiny_patch4_window7_224", {"patch_size": 1, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4),
                                              "window_size": 4, "img_size": 8}, 8,
             ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 4}, 28,
            ["blocks.0", "blocks.1"]),
    "densenet": ("densenet40_cifar", {"depth": 10}, 32, []),
}  # fmt: skip


def made(which: str) -> tuple[nn.Module, Tensor]:
    name, kwargs, side, _ = FAMILIES[which]
    torch.manual_seed(0)
    model = models.create(name, 10, 3, kwargs=kwargs).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # layer scales begin near zero
    return model, torch.randn(2, 3, side, side, dtype=torch.float64)


def changes(graph: DependencyGraph, first: float = 0.0) -> dict[str, Tensor]:
    """Scores of channels and blocks, by place."""
    channels = {g.name: torch.arange(1.0, g.width + 1) for g in graph.free}
    return channels | {block.key: torch.tensor([first + i]) for i, block in enumerate(graph.free_blocks)}


@pytest.mark.parametrize("which", FAMILIES)
@pytest.mark.parametrize("streams", [False, True])
def test_a_block_that_goes_leaves_its_shortcut(which, streams):
    if streams and which in ("mobilenetv2", "densenet"):
        pytest.skip("its streams run through batch norms alone, and are free without")
    model, images = made(which)
    graph = trace_groups(model, images[:1], streams=streams, depth=True)
    assert [block.path for block in graph.blocks] == FAMILIES[which][3]
    if not graph.blocks:
        return
    gone = graph.blocks[::2]
    counts = {group.name: list(range(1, group.width)) for group in graph.free} | {block.key: [] for block in gone}
    plan = Plan.from_kept(graph, counts)
    assert plan.blocks_removed == tuple(sorted(block.path for block in gone))
    assert not any(name in plan.removed for block in gone for name in block.groups)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    # the same as the network whose blocks hand on what they read, and whose channels are cut
    expected = copy.deepcopy(model)
    apply_plan(expected, graph, replace(plan, blocks_removed=()))
    for block in gone:
        expected.get_submodule(block.path).register_forward_hook(lambda _module, args, _output: args[0])
    with torch.no_grad():
        assert torch.equal(small(images), expected(images))
        assert not torch.allclose(small(images), model(images))
    # arithmetic, a count of parameters, a second trace and the memory of a run agree
    assert cost.params(graph, plan.counts) == sum(p.numel() for p in small.parameters())
    again = trace_groups(small, images[:1], streams=streams, depth=True)
    assert cost.macs(again) == cost.macs(graph, plan.counts)
    left = graph_after(graph, plan)
    assert {g.name: g.width for g in left.free} == {g.name: g.width for g in again.free}
    assert [block.path for block in left.blocks] == [block.path for block in again.blocks]
    assert (cost.macs(left), cost.params(left)) == (cost.macs(again), cost.params(again))
    assert COSTS["macs"].share(left, {}) == cost.macs(again) / cost.macs(graph)
    if which in ("resnet", "vit"):
        assert COSTS["memory"].of(graph, plan.counts) == measure_peak(small, images[:1].clone())
    # a file, a new network and the optimizer's tables follow
    read = Plan.from_json(plan.to_json())
    assert read == plan and read.fingerprint != replace(plan, blocks_removed=()).fingerprint
    name, kwargs, *_ = FAMILIES[which]
    loaded = rebuild(models.create(name, 10, 3, kwargs=kwargs).double(), read, small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))
    loaded.train()(images).square().mean().backward()
    tables = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    pruned = prune_tensors_like(model, graph, plan, tables)
    assert {n: t.shape for n, t in pruned.items()} == {n: p.shape for n, p in small.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Chain(nn.Module):
    """A shortcut that scales, one that ends in another shape, one around two layers, a part that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.scaled, self.plain, self.shared, self.read = Scaled(), Plain(), Plain(), Plain()
        self.again = self.shared
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.shared(self.plain(self.scaled(self.stem(x)))))
        x = self.read(x) * self.read.conv.weight.mean()
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Scaled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + self.conv(x)


def test_only_plain_shortcuts_go():
    """Not a scaled shortcut, not a module that runs twice, not one whose parts the network reads elsewhere."""
    torch.manual_seed(0)
    graph = trace_groups(Chain(), torch.zeros(1, 3, 6, 6), depth=True)
    assert [block.path for block in graph.blocks] == ["plain"]
    assert "1 blocks that can go as a whole: plain" in str(graph)
    assert trace_groups(Chain(), torch.zeros(1, 3, 6, 6)).blocks == ()


def test_blocks_lose_the_share_that_channels_lose():
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    request = SelectionRequest(keep_ratio=0.5, depth=True)
    plan = Plan.from_kept(graph, select_by_score(graph, changes(graph), request))
    assert plan.blocks_removed == ("layer1.0", "layer1.1", "layer1.2")  # 3.5 of 7, those with the smallest changes
    assert plan.counts["layer2.0.conv1"] == 16 and plan.counts["layer1.0.conv1"] == 16
    assert plan.reasons["layer1.0.conv1"] == "its block layer1.0 is removed"
    only = Plan.from_kept(graph, select_by_score(graph, changes(graph), replace(request, depth="only")))
    assert only.blocks_removed == plan.blocks_removed and not only.removed
    most = SelectionRequest(keep_ratio=0.01, depth="only")
    assert len(Plan.from_kept(graph, select_by_score(graph, changes(graph), most)).blocks_removed) == 6  # one stays
    floor = replace(most, max_ratio=0.3)
    assert len(Plan.from_kept(graph, select_by_score(graph, changes(graph), floor)).blocks_removed) == 2
    named = graph.exclude(["layer1.*"])
    assert all("select.exclude" in block.protected for block in named.blocks[:3])
    plan = Plan.from_kept(named, select_by_score(named, changes(named), request))
    assert plan.blocks_removed == ("layer2.1", "layer2.2")
    assert [block.path for block in graph.restrict_to(["layer3.*"]).free_blocks] == ["layer3.1", "layer3.2"]


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize(
    ("quantity", "first", "second"), [("macs", 0.6, 0.45), ("params", 0.6, 0.45), ("memory", 0.9, 0.7)]
)
def test_targets_are_met_with_blocks(scope, quantity, first, second):
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    request = SelectionRequest(target=(quantity, first), depth=True, scope=scope, round_to=1)
    plan = Plan.from_kept(graph, select_by_score(graph, changes(graph, 1.0), request))
    assert plan.blocks_removed
    share = COSTS[quantity].share(graph, plan.counts)
    assert first - 0.2 < share <= first
    low = reachable(graph, request, quantity)[0]
    assert low < reachable(graph, replace(request, depth=False), quantity)[0] or quantity == "memory"
    # a second round goes on where the first one stopped
    left = graph_after(graph, plan)
    lower = replace(request, target=(quantity, second))
    cut = Plan.from_kept(left, select_by_score(left, changes(left, 1.0), lower))
    both = plan.then(cut)
    assert set(both.blocks_removed) == {*plan.blocks_removed, *cut.blocks_removed}
    assert COSTS[quantity].share(left, cut.counts) == COSTS[quantity].share(graph, both.counts) <= second
    small, twice = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(small, graph, both)
    apply_plan(twice, graph, plan)
    apply_plan(twice, left, cut)
    with torch.no_grad():
        assert torch.equal(small(images), twice(images))


def test_what_is_refused():
    model, images = made("resnet")
    plain = trace_groups(model, images[:1])
    request = SelectionRequest(keep_ratio=0.5, depth=True)
    with pytest.raises(PruneError, match="no residual block with a plain shortcut"):
        select_by_score(plain, changes(plain), request)
    graph = with_blocks(model, plain, images[:1])
    with pytest.raises(PruneError, match="leave out select.depth"):
        select_by_score(graph, changes(graph), SelectionRequest(counts=(3,) * len(graph.free), depth=True))
    plan = Plan({}, {g.name: g.width for g in graph.groups}, blocks_removed=("layer1.0",))
    for use in (apply_plan, lambda _model, graph, plan: graph_after(graph, plan)):
        with pytest.raises(PruneError, match=r"removes the block 'layer1.0'.*Write select.depth=true"):
            use(copy.deepcopy(model), plain, plan)
    with pytest.raises(PruneError, match="a block that this network has not"):
        rebuild(copy.deepcopy(model), replace(plan, blocks_removed=("layer1.9",)), model.state_dict())
    with pytest.raises(PruneError, match="not ascending"):
        replace(plan, blocks_removed=("layer1.1", "layer1.0"))
    with pytest.raises(PruneError, match="weights do not fit"):
        rebuild(copy.deepcopy(model), plan, model.state_dict())


def test_a_bundle_knows_its_blocks(tmp_path):
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    plan = Plan.from_kept(graph, {"block:layer3.2": []})
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    spec = {"name": "resnet20_cifar", "kwargs": {"img_size": 8}, "num_classes": 10, "in_chans": 3}
    weights = small.float().state_dict()
    text = bundle.manifest_json(
        spec, plan, tiny.IMAGE | {"mean": [0.3] * 3, "std": [0.4] * 3}, CLASSES, weights, {}, {}
    )
    (tmp_path / bundle.MANIFEST).write_text(text)
    tensor_files.save_tensors(tmp_path / bundle.WEIGHTS, weights)
    loaded = bundle.load(tmp_path).double().eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), small.double()(images))


@pytest.mark.parametrize("path", ["blocks.1.attn", "blocks.1.mlp", "layer2.0"])
def test_a_bundle_whose_block_is_none_is_refused(tmp_path, path):
    """Its attention alone has the shape of a block, and would hand on what its norm returns."""
    model, images = made("resnet" if path == "layer2.0" else "vit")
    name, kwargs, side, _ = FAMILIES["resnet" if path == "layer2.0" else "vit"]
    widths = {group.name: group.width for group in trace_groups(model, images[:1]).groups}
    weights = {key: t for key, t in model.float().state_dict().items() if not key.startswith(f"{path}.")}
    spec = {"name": name, "kwargs": kwargs, "num_classes": 10, "in_chans": 3}
    image = tiny.IMAGE | {"mean": [0.3] * 3, "std": [0.4] * 3, "size": side}
    text = bundle.manifest_json(spec, Plan({}, widths, blocks_removed=(path,)), image, CLASSES, weights, {}, {})
    (tmp_path / bundle.MANIFEST).write_text(text)
    tensor_files.save_tensors(tmp_path / bundle.WEIGHTS, weights)
    with pytest.raises(PruneError, match=f"removes '{path}' as a block, and this .* is no residual block"):
        bundle.load(tmp_path)


def test_a_curve_of_channels_alone_looks_at_no_block():
    """A group alone at a keep ratio loses its channels, also if the recipe removes nothing but blocks."""
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    request = with_keep_ratios(SelectionRequest(target=("macs", 0.5), depth="only"), {"layer1.0.conv1": 0.5})
    plan = Plan.from_kept(graph, select_by_score(graph, changes(graph), request))
    assert len(plan.removed["layer1.0.conv1"]) == 8 and len(plan.removed) == 1 and not plan.blocks_removed


def blocks_of_digits(ranks: Communicator | None = None) -> DistributedScoringContext:
    model = tiny.network(name="resnet20_cifar")
    digits = tiny.bench(model, ranks)
    digits.graph = with_blocks(model, digits.graph, tiny.example()[:1])
    return digits


def block_scores(ranks: Communicator) -> dict[str, Tensor]:
    return block_changes(blocks_of_digits(ranks))


def test_ranks_measure_the_same_changes(pool):
    one, two, three = (pool.run(world, block_scores)[0] for world in (1, 2, 3))
    assert len(one) == 7 and all(0 < float(change) < 2 for change in one.values())
    for other in (two, three):
        assert {key: change.tolist() for key, change in other.items()} == {k: c.tolist() for k, c in one.items()}


def test_the_change_of_a_block():
    """1 - cos of what it reads and what it returns, by hand."""
    digits = blocks_of_digits()
    found, seen = block_changes(digits), []
    handle = digits.model.get_submodule("layer2.1").register_forward_hook(
        lambda _m, args, out: seen.append((args[0], out))
    )
    with torch.no_grad():
        for number in digits.ids:
            digits.model(next(digits.loader.batches([np.array([number])])).images)
    handle.remove()
    cos = [float(torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)) for x, y in seen]
    assert float(found["block:layer2.1"]) == pytest.approx(1 - sum(cos) / len(cos), rel=1e-9)


class InPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x += self.conv(x)
        return x


class Keyword(Plain):
    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return hidden + self.conv(hidden)


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = FrozenBatchNorm2d(8)
        nn.init.normal_(self.norm.get_buffer("running_mean"))
        nn.init.normal_(self.norm.get_buffer("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class OneBlock(nn.Module):
    def __init__(self, block: nn.Module, by_keyword: bool = False) -> None:
        super().__init__()
        self.stem, self.block, self.last, self.head = nn.Conv2d(3, 8, 1), block, nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.by_keyword = by_keyword

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(hidden=x, mask=None) if self.by_keyword else self.block(x)
        return self.head(self.last(x).mean((2, 3)))


@pytest.mark.parametrize("kind", [InPlace, Keyword, Frozen])
def test_unusual_blocks_are_found_and_go(kind):
    """One that writes into what it reads, one that is called by keyword, one whose norm has buffers for weights."""
    torch.manual_seed(0)
    model, images = OneBlock(kind(), by_keyword=kind is Keyword), torch.randn(2, 3, 6, 6)
    graph = trace_groups(model, images[:1], depth=True)
    assert [block.path for block in graph.blocks] == ["block"]
    small = copy.deepcopy(model)
    apply_plan(small, graph, Plan.from_kept(graph, {"block:block": []}))
    with torch.no_grad():
        assert torch.equal(small(images), model.head(model.last(model.stem(images)).mean((2, 3))))


@pytest.mark.parametrize(
    ("paths", "what"),
    [
        (("layer1", "layer1.0"), "'layer1.0', which lies inside it"),
        ("layer1.0", "no module paths"),
        (5, "no module paths"),
        (None, "no module paths"),
        ({"layer1.0": 1}, "no module paths"),
        (("",), "no module paths"),
        ((1, "layer1.0"), "no module paths"),
        (("layer1.0", "layer1.0"), "not ascending"),
    ],
)
def test_odd_paths_are_refused(paths, what):
    body = {"format": 1, "removed": {}, "widths": {"conv1": 16}}
    with pytest.raises(PruneError, match=what):
        Plan({}, {"conv1": 16}, blocks_removed=paths)
    with pytest.raises(PruneError, match=what):
        Plan.from_dict(body | {"blocks_removed": list(paths) if isinstance(paths, tuple) else paths})


def test_layers_do_not_go_as_blocks():
    """A path of a layer, or of a module without weights, would change the network in silence."""
    model, images = made("resnet")
    widths = {group.name: group.width for group in trace_groups(model, images[:1]).groups}
    for path, kind in (("layer1.0.conv1", "Conv2d"), ("layer1.0.bn1", "BatchNorm2d")):
        weights = {name: t for name, t in model.state_dict().items() if not name.startswith(f"{path}.")}
        plan = Plan({}, widths, blocks_removed=(path,))
        with pytest.raises(PruneError, match=f"removes '{path}' as a block, and it is a {kind}"):
            rebuild(copy.deepcopy(model), plan, weights)


def test_pruning_information_has_no_blocks():
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    with pytest.raises(PruneError, match="'layer1.0' and 0 other residual blocks go as a whole.*--out plan.json"):
        to_saved_idxs(Plan.from_kept(graph, {"block:layer1.0": []}), graph)


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("depth", [True, "only"])
def test_a_target_that_scores_do_not_let_is_refused(scope, depth):
    """The block that stays is the one with the largest score, which may be a large one."""
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    request = SelectionRequest(target=("params", 0.5), depth=depth, scope=scope)
    low = reachable(graph, request, "params")[0]
    with pytest.raises(PruneError, match="cannot be reached with these scores"):
        select_by_score(graph, changes(graph), replace(request, target=("params", low)))
    largest_first = {block.key: torch.tensor([-float(i)]) for i, block in enumerate(graph.blocks)}
    kept = select_by_score(graph, changes(graph) | largest_first, replace(request, target=("params", low)))
    assert COSTS["params"].share(graph, Plan.from_kept(graph, kept).counts) == low


@pytest.mark.parametrize("depth", [True, "only"])
def test_a_share_that_is_kept_stays_in_the_next_round(depth):
    """Under global all channels of a block that is gone count as gone, and with ``only`` blocks alone compete."""
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    request = SelectionRequest(keep_ratio=0.5, depth=depth, scope="global")
    # blocks are in the middle of the channels: 0.5 to 1.5 of their mean
    scores = changes(graph, 3.0)
    plan = Plan.from_kept(graph, select_by_score(graph, scores, request))
    assert plan.blocks_removed
    if depth == "only":
        assert plan.blocks_removed == ("layer1.0", "layer1.1", "layer1.2")
    left = graph_after(graph, plan)
    assert Plan.from_kept(left, select_by_score(left, changes(left, 3.0), request)).empty


def test_blocks_with_named_layers_stay():
    model, images = made("resnet")
    graph = trace_groups(model, images[:1], depth=True)
    request = SelectionRequest(keep_ratio=0.5, depth=True)
    for more in ({"keep_ratios": {"layer1.0.conv1": 1.0}}, {"max_ratio": {"layer1.0.*": 0.25}}):
        held = hold_blocks(graph, replace(request, **more))
        assert "names its layers" in held.blocks[0].protected and len(held.free_blocks) == 6
    assert hold_blocks(graph, replace(request, max_ratio={"layer1.0.*": 1.0})) == graph
    with pytest.raises(PruneError, match=r"no block may go, layer1.0 for one because select.max_ratio '\*'"):
        hold_blocks(graph, replace(request, max_ratio={"*": 0.5}))


def in_place_scores(ranks: Communicator) -> dict[str, Tensor]:
    digits = blocks_of_digits(ranks)
    block = digits.model.get_submodule("layer2.1")
    plain = block.forward

    def forward(x: Tensor) -> Tensor:
        return x.copy_(plain(x))

    block.forward = forward
    return block_changes(digits)


def infinite_scores(ranks: Communicator) -> str:
    digits = blocks_of_digits(ranks)
    digits.model.get_parameter("layer2.1.conv1.weight").data[0, 0, 0, 0] = float("inf")
    with pytest.raises(PruneError) as caught:
        block_changes(digits)
    return str(caught.value)


def test_a_block_that_writes_into_what_it_reads_has_the_same_change(pool):
    plain, found = pool.run(1, block_scores)[0], pool.run(1, in_place_scores)[0]
    assert {key: float(change) for key, change in found.items()} == {k: float(c) for k, c in plain.items()}


def test_changes_that_are_not_finite_are_refused(pool):
    for text in pool.run(2, infinite_scores):
        assert "residual blocks change what they read cannot be measured (layer2.1" in text
