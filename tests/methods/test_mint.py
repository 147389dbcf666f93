"""MINT: thresholds, caps, taps and groups by the specification; masks that hold; the released code's departures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_prune import methods, models
from dist_prune.config import loading
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.mint import method as mint
from dist_prune.methods.mint import mutual_information, quirks
from dist_prune.methods.mint.layer_pairs import contiguous_groups
from dist_prune.methods.mint.mutual_information import tile_size
from dist_prune.methods.mint.thresholds import capped_threshold, global_threshold
from dist_prune.pruning.hooks.activations import ChannelMeans
from dist_prune.pruning.plan.block_masks import mask_violations, weight_masks, weights_left
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import WeightBlocks
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny
from tests.training.test_training import Killed, kill_after, trainer

HAND = np.array([0.1, 0.1, 0.1, 0.2, 0.3])
VGG = (0.671, 0.518, 0.584, 0.612, 0.899, 0.937, 0.920, 0.863, 0.910, 0.933)
R50 = (
    .735, .319, .441, .344, .031, .285, .270, .176, .266, .353, .485, .279, .361, .833, .246, .290, .338, .438, .518,
    .142, .382, .330, .330, .848, .357, .813, .774, .107, .121, .530, .467, .908, .885, .669, .258, .211, .486, .223,
    .041, .324, .282, .302, .035, .052, .911, .842, .674, .616, .520, .891, .780, .685,
)  # fmt: skip


def mint_with(**options):
    return mint.Mint(mint.Options(**options))


def units(values) -> np.ndarray:
    return np.round(np.asarray(values) * 10).astype(np.int64)


def test_the_hand_example_of_distinct_quantiles():
    table = units(HAND)[None]
    at = global_threshold([table], [np.ones_like(table)], 0.34, "distinct")
    assert at == 2
    assert (table <= at).sum() == 4


@pytest.mark.parametrize(("p", "quantile", "cut"), [
    (0.01, "entries", 3), (0.6, "entries", 3), (0.61, "entries", 4), (1.0, "entries", 5), (1.0, "distinct", 5),
    (0.3, "weights", 3), (0.31, "weights", 4), (0.5, "weights", 4), (0.51, "weights", 5),
])  # fmt: skip
def test_quantiles_of_entries_and_weights_cut_at_least_what_is_asked(p, quantile, cut):
    """The entry .2 has as many weights as two others, .3 as five."""
    table, weights = units(HAND)[None], np.array([[1, 1, 1, 2, 5]])
    assert (table <= global_threshold([table], [weights], p, quantile)).sum() == cut


def test_caps():
    table, weights = units([[0.1, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7]]), np.ones((2, 4), np.int64)
    for cap, kept in ((0.5, 4), (0.49, 3), (0.25, 2), (0.2, 0), (1.0, 7)):
        assert (table <= capped_threshold(table, weights, cap, 6)).sum() == kept, (
            "never more than the cap, nor than asked"
        )
    assert quirks.distinct_cap(table, weights, 0.9, 6) == 6, "seven of eight are below the cap"
    assert quirks.distinct_cap(table, weights, 0.5, 6) == 5, "entry round(.5 * 7) of 7 distinct values: 5 of 8 go"


def digits(method, images: int = tiny.IMAGES, name: str = "resnet8p_cifar", ranks: Communicator | None = None):
    bench = tiny.bench(tiny.network(name=name), ranks, images=images)
    return bench, method.score(bench)


def tables_on(ranks: Communicator, fidelity: str) -> dict[str, list]:
    found = digits(mint_with(groups=16, fidelity=fidelity, memory_mb=64), 150, ranks=ranks)[1]
    return {name: table.tolist() for name, table in found.items()}


@pytest.mark.parametrize("fidelity", ["correct", "as_released"])
def test_every_world_finds_the_same_table(fidelity, pool):
    assert tile_size(100, 16, 64 << 20) == 2, "two parent groups in a job"
    found = [tables for world in (1, 2, 3) for tables in pool.run(world, tables_on, fidelity)]
    assert all(tables == found[0] for tables in found)
    tables = [table for name, table in found[0].items() if name.endswith("edges")]
    assert len({edge for table in tables for row in table for edge in row}) > 5


@pytest.mark.slow
def test_threads_and_memory_do_not_move_scores():
    """One, three and four parent groups of 32 worked on together, with one child table beside them or two."""
    budgets = {1: 1, 4: 3, 64: 4}
    assert {megabytes: tile_size(300, 32, megabytes << 20) for megabytes in budgets} == budgets

    def found(megabytes: int, threads: int) -> dict[str, torch.Tensor]:
        options = mint.Options(groups=32, skip=("layer1*", "layer2*", "layer3.0.conv*"))
        method = mint.Mint(options.model_copy(update={"memory_mb": megabytes}))  # less than a recipe may say
        torch.set_num_threads(threads)
        try:
            return digits(method, 450)[1]
        finally:
            torch.set_num_threads(1)

    wide = found(64, 1)
    assert len(wide) == 4
    for narrow in (found(1, 2), found(4, 2)):
        assert all(torch.equal(wide[name], narrow[name]) for name in wide)
    assert "memory_mb" not in mint.Options.score_options()


def test_pairs_of_a_residual_network():
    """A child behind a sum is fed by the sum, one in a plain chain by the layer before it; the stem has no parent."""
    channels = trace_groups(tiny.network(name="resnet20_cifar"), tiny.example()[:1])
    pairs = {pair.child: pair for pair in mint_with().pairs(channels)}
    assert "conv1" not in pairs
    assert len(pairs) == 19
    assert pairs["layer1.0.conv2"].below.name == "layer1.0.conv1"
    assert pairs["layer2.0.conv1"].below.name == "layer2.0.conv1:in"
    assert pairs["layer2.0.conv1"].below.width == 16
    assert pairs["linear"].below.name == "linear:in"
    numbered = {pair.child: pair for pair in mint_with(fidelity="as_released").pairs(channels)}
    assert numbered["layer2.0.conv1"].below.name == "layer1.2.conv2"
    projected = trace_groups(tiny.network(), tiny.example()[:1])
    released = {pair.child: pair for pair in mint_with(quirks=("numbered_parents",)).pairs(projected)}
    assert released["layer2.0.downsample.0"].below.name == "layer2.0.conv2", "the layer before it in number"
    assert released["layer2.0.downsample.0"].below.width == 32, "wider than the 16 true inputs"
    assert max(max(part) for part in released["layer2.0.downsample.0"].y) == 15
    correct = {pair.child: pair for pair in mint_with().pairs(projected)}
    assert correct["layer2.0.downsample.0"].below.name == "layer2.0.downsample.0:in"


def test_pairs_of_the_perceptron_read_what_the_next_layer_is_fed():
    channels = trace_groups(models.create("mlp_mnist", 10, 1).eval(), torch.zeros(1, 1, 28, 28))
    options = {"taps": "consumed", "parent_groups": {"fc2": 250}, "child_groups": {"fc*": 10, "fc2": 100}}
    two, three = mint_with(**options | {"child_groups": {"fc2": 100, "fc3": 10}}).pairs(channels)
    assert (two.child, two.below.name, two.above.name) == ("fc2", "fc2:in", "fc3:in")
    assert (three.child, three.below.name, three.above.name) == ("fc3", "fc3:in", "fc3")
    assert (len(two.rows), len(two.columns), len(three.rows)) == (100, 250, 10)
    released = mint_with(**options | {"child_groups": {"fc2": 100, "fc3": 10}}, fidelity="as_released").pairs(channels)
    assert released == [two, three], "the released program hooks the perceptron's layers behind their ReLU"
    raw = mint_with().pairs(channels)
    assert mint_with(fidelity="as_released").pairs(channels) == raw
    assert [pair.below.name for pair in raw] == ["fc1", "fc2"]
    assert [len(pair.rows) for pair in raw] == [60, 10], "the largest divisors up to 64"
    with pytest.raises(PruneError, match=r"fc3: 10 channels .* into 7 equal groups; possible: \[1, 2, 5, 10"):
        mint_with(child_groups={"fc3": 7}).pairs(channels)
    assert contiguous_groups(6, 4, False, "x") == ((0, 1), (2, 3), (4, 5))


def test_taps_show_raw_outputs_and_true_inputs():
    model = tiny.network()
    bench = tiny.bench(model)
    pairs = {pair.child: pair for pair in mint_with().pairs(bench.graph)}
    sites = [pairs["layer2.0.conv1"].below, pairs["layer2.0.conv1"].above, pairs["linear"].below]
    found = bench.collect(sites, ChannelMeans())
    batch = next(bench.loader.batches([bench.ids]))
    x = torch.relu(model.bn1(model.conv1(batch.images)))  # type: ignore[operator]
    x = model.get_submodule("layer1")(x)
    raw = model.get_submodule("layer2.0.conv1")(x)
    assert torch.allclose(found["layer2.0.conv1:in"]["means"].double(), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(found["layer2.0.conv1"]["means"].double(), raw.mean((2, 3)), atol=1e-6)
    assert found["linear:in"]["means"].shape == (tiny.IMAGES, 64)


def test_samples_are_stratified_and_the_quirks_draw_as_released():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 30)
    ways = (mutual_information.without_replacement, quirks.with_replacement)
    once, again = (
        mutual_information.sample_images(labels, 20, draw, torch.Generator().manual_seed(0)) for draw in ways
    )
    assert np.bincount(labels[once]).tolist() == np.bincount(labels[again]).tolist() == [20, 20, 20]
    assert len(set(once.tolist())) == 60 > len(set(again.tolist()))
    assert once.tolist() != sorted(once.tolist()), "the split in thirds is by place"
    with pytest.raises(PruneError, match=r"samples_per_class: 21, but a class has only 20"):
        mutual_information.sample_images(labels, 21, mutual_information.without_replacement, torch.Generator())
    bench = tiny.bench(tiny.network(), images=200)
    below, above = mint_with(quirks=("independent_samples",), samples_per_class=9)._samples(bench)
    assert len(below) == len(above) == 90
    assert below.tolist() != above.tolist()
    assert bench.labels[above].bincount().tolist() == [9] * 10
    same = mint_with(samples_per_class=9)._samples(bench)
    assert same[0].tolist() == same[1].tolist()


@pytest.mark.parametrize("quirk", ["independent_samples", "with_replacement", "swapped_neighbour", "edge_numbers"])
def test_each_quirk_alone_moves_the_scores(quirk):
    plain, moved = digits(mint_with(groups=8), 150)[1], digits(mint_with(groups=8, quirks=(quirk,)), 150)[1]
    assert any(not torch.equal(plain[name], moved[name]) for name in plain)


def test_clamped_scores_have_no_value_below_zero():
    edges = torch.tensor([[3, 9], [12, 10]])
    assert quirks.clamped_score(edges, 10).tolist() == [[3, 9], [10, 10]]


def test_p_masks_blocks_and_the_plan_says_how_much():
    method = mint_with(groups=8, p=(0.5,), skip=("linear",))
    bench, scores = digits(method)
    plan = method.select(scores, bench.graph, SelectionRequest())
    counts = weights_left(plan, bench.graph)
    scored = [counts[pair.child] for pair in method.pairs(bench.graph)]
    share = 1 - sum(n for n, _ in scored) / sum(n for _, n in scored)
    assert 0.5 <= share < 0.85, "scores are quantised: at least what was asked"
    assert counts["linear"][0] == counts["linear"][1]
    capped = mint_with(groups=8, p=(0.5,), skip=("linear",), cap=0.3, caps={"layer3*": 0.1}, promote=False)
    capped = capped.select(scores, bench.graph, SelectionRequest())
    for name, (kept, whole) in weights_left(capped, bench.graph).items():
        assert 1 - kept / whole <= (0.1 if name.startswith("layer3") else 0.3) + 1e-9
    small = tiny.cut(bench.model, bench.graph, plan)
    masks = weight_masks(plan, bench.graph, small.state_dict())
    assert masks
    assert mask_violations(small.state_dict(), masks) == []


@pytest.mark.parametrize("criterion", ["l1", "random"])
def test_blocks_by_weight_or_by_chance_are_cut_at_the_same_rates(criterion):
    """By hand: the mean absolute weight of a block over that of its layer, ranked over all layers; no image is read."""
    method = mint_with(groups=8, p=(0.5,), skip=("linear",), criterion=criterion, promote=False)
    bench, scores = digits(method)
    pairs = {pair.child: pair for pair in method.pairs(bench.graph)}
    assert scores.keys() == {f"{name}:order" for name in pairs}
    values, order = [], []
    for name, pair in pairs.items():
        weight = bench.model.get_submodule(name).weight.detach().abs()
        for i, row in enumerate(pair.rows):
            for j, column in enumerate(pair.columns):
                values.append(float(weight[list(row)][:, list(column)].mean() / weight.mean()))
                order.append(int(scores[f"{name}:order"][i, j]))
    assert sorted(order) == list(range(len(order))), "no two blocks are equal here"
    by_weight = np.argsort(np.argsort(values))
    assert (by_weight.tolist() == order) == (criterion == "l1")
    counts = weights_left(method.select(scores, bench.graph, SelectionRequest()), bench.graph)
    cut, whole = (sum(counts[name][k] for name in pairs) for k in (0, 1))
    assert 0.5 <= 1 - cut / whole < 0.52
    assert digits(method)[1][f"{name}:order"].equal(scores[f"{name}:order"])
    structured = mint_with(groups=8, skip=("linear",), criterion=criterion).select(
        scores, bench.graph, SelectionRequest(keep_ratio=0.5)
    )
    assert structured.removed
    with pytest.raises(PruneError, match="have no '.*:order'"):
        method.select(digits(mint_with(groups=8))[1], bench.graph, SelectionRequest())


def test_excluded_layers_keep_all_their_weights():
    """p then speaks of the others; the protected output layer can be excluded as well; the score file is the same."""
    method = mint_with(groups=8, p=(0.5,))
    bench, scores = digits(method)
    channels = method.prepare(bench.graph, ("layer2.0.conv1", "layer3*", "linear"), SelectionRequest())
    plan = method.select(scores, channels, SelectionRequest())
    assert plan.blocks.keys() == {"layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer2.0.downsample.0"}
    counts = weights_left(plan, channels)
    assert all(counts[name][0] == counts[name][1] for name in counts if name.startswith(("layer3", "linear")))
    (row,) = method.table(scores, channels, SelectionRequest())
    cut = [counts[name] for name in plan.blocks]
    assert row["scored_percent"] == 100 * (1 - sum(kept for kept, _ in cut) / sum(whole for _, whole in cut)) >= 50
    perceptron = trace_groups(models.create("mlp_mnist", 10, 1).eval(), torch.zeros(1, 1, 28, 28))
    with pytest.raises(PruneError, match=r"select\.exclude and method\.skip leave no layer"):
        mint_with(p=(0.5,), skip=("fc3",)).prepare(perceptron, ("fc2",), SelectionRequest())


@pytest.mark.parametrize(("key", "value", "said"), [
    ("skip", ["fcc3"], r"method\.skip: no layer matches\. unknown layer 'fcc3'\. Did you mean 'fc[123]'"),
    ("parent_groups", {"fc1": 250}, r"method\.parent_groups: no layer that .*'fc1'.* Allowed: fc2, fc3"),
    ("child_groups", {"fc4": 10}, r"method\.child_groups: no layer that .* 'fc4'"),
    ("caps", {"features*": 0.5}, r"method\.caps: no .* 'features\*'.* Allowed: fc2, fc3"),
    ("parent_groups", {"fc2": 0}, r"method\.parent_groups\.fc2.*greater than or equal to 1"),
    ("child_groups", {"fc2": -10}, r"method\.child_groups\.fc2.*greater than or equal to 1"),
    ("caps", {"fc2": 0}, r"method\.caps\.fc2.*greater than 0"),
])  # fmt: skip
def test_globs_and_numbers_that_would_be_ignored_are_refused(key, value, said):
    channels = trace_groups(models.create("mlp_mnist", 10, 1).eval(), torch.zeros(1, 1, 28, 28))
    with pytest.raises(PruneError, match=said):
        words = [f"method.{key}={json.dumps(value)}"]
        spec = loading.load("mlp_mnist_mint", words, methods.options_of, need_environment=False)
        options = {name: option for name, option in spec.method.items() if name != "name"}
        mint_with(**options).prepare(channels, (), SelectionRequest())


def test_a_grid_is_a_table_and_an_index_takes_one_value():
    method = mint_with(groups=8, p=(0.2, 0.5, 0.8))
    bench, scores = digits(method)
    rows = method.table(scores, bench.graph, SelectionRequest(index=1))
    assert [row["index"] for row in rows] == [1, 2, 3]
    assert [row["scored_percent"] >= 100 * p for row, p in zip(rows, (0.2, 0.5, 0.8), strict=True)] == [True] * 3
    prints = {method.select(scores, bench.graph, SelectionRequest(index=i)).fingerprint for i in (1, 2, 3)}
    assert len(prints) == 3
    for request, said in (
        (SelectionRequest(), r"select\.index: method\.p has 3"),
        (SelectionRequest(index=4), "none of the 3 values"),
    ):
        with pytest.raises(PruneError, match=said):
            method.select(scores, bench.graph, request)


@pytest.mark.parametrize(
    ("options", "request_", "said"),
    [
        ({"p": (0.5,)}, SelectionRequest(target=("macs", 0.5)), "target cannot be asked for as well"),
        ({"p": (0.0,)}, SelectionRequest(), r"method\.p: quantiles"),
        ({}, SelectionRequest(), "set target.macs"),
        ({"structured": False}, SelectionRequest(), r"method\.p: quantiles"),
    ],
)
def test_requests_that_contradict_themselves(options, request_, said):
    channels = trace_groups(tiny.network(), tiny.example()[:1])
    with pytest.raises(PruneError, match=said):
        mint_with(**options).prepare(channels, (), request_)


def test_structured_removes_the_channels_with_the_smallest_sums():
    method = mint_with(p=(0.5,), structured=True)
    bench, scores = digits(method)
    plan = method.select(scores, bench.graph, SelectionRequest(target=("params", 0.6)))
    assert not plan.blocks
    assert 0.4 < cost_share(bench.graph, "params", plan.counts) <= 0.6
    favoured = {name: table.clone() for name, table in scores.items()}
    favoured["layer2.0.conv1:edges"][5] = 0  # fully dependent on its inputs
    favoured["layer2.0.conv1:edges"][6] = 10_000
    plan = method.select(favoured, bench.graph, SelectionRequest(keep_ratio=0.5))
    assert 5 in plan.kept("layer2.0.conv1")
    assert 6 not in plan.kept("layer2.0.conv1")


def test_groups_that_no_pair_touches_are_protected():
    channels = trace_groups(tiny.network(), tiny.example()[:1])
    limited = mint_with(skip=("*",)).prunable(channels)
    assert not limited.free
    assert "no scored pair" in limited.group("conv1").protected


def cutting(channels, names, shares) -> Plan:
    """A plan that cuts these shares of layers, in 64 x 64 blocks (the nearest whole number of blocks)."""
    blocks = {}
    for name, share in zip(names, shares, strict=True):
        layer = channels.layers[name]
        rows, columns = (contiguous_groups(width, 64, True, name) for width in (layer.width_out, layer.width_in))
        gone = np.arange(64 * 64).reshape(64, 64) < round(share * 64 * 64)
        blocks[name] = WeightBlocks.of(rows, columns, [np.flatnonzero(row) for row in gone])
    return Plan({}, {group.name: group.width for group in channels.groups}, {}, blocks)


@pytest.mark.parametrize(
    ("backbone", "side", "weights", "masked", "first", "last", "shares", "percent"),
    [
        ("vgg16_bn_maxpool_cifar", 32, 14_977_728, 14_712_832, 4, 14, VGG, 83.46),
        ("resnet50", 64, 25_502_912, 23_445_504, 1, 53, R50, 49.62),
    ],
)
def test_mask_arithmetic_of_the_paper_s_profiles(backbone, side, weights, masked, first, last, shares, percent):
    """The fractions per layer that the authors plotted give the percentages of their tables."""
    classes = 10 if side == 32 else 1000
    channels = trace_groups(models.create(backbone, classes, 3).eval(), torch.zeros(1, 3, side, side))
    names = [n for n, layer in channels.layers.items() if layer.kind in ("conv", "linear")][first:last]
    plan = cutting(channels, names, shares)
    left = weights_left(plan, channels)
    assert sum(whole for _, whole in left.values()) == weights
    assert sum(left[name][1] for name in names) == masked
    assert 100 * (1 - sum(kept for kept, _ in left.values()) / weights) == pytest.approx(percent, abs=0.01)


@pytest.mark.parametrize(
    ("recipe", "side", "pairs", "masked", "scores"),
    [
        ("mlp_mnist_mint", 28, 1, 150_000, 25_000),
        ("vgg16_cifar10_mint", 32, 10, 14_712_832, 40_960),
        ("resnet56_cifar10_mint", 32, 50, 785_664, 87_296),
        ("resnet50_mint", 64, 52, 23_445_504, 212_992),
    ],
)
def test_recipes_score_the_pairs_that_the_paper_masks(recipe, side, pairs, masked, scores):
    spec = loading.load(recipe, [], methods.options_of, need_environment=False)
    method = mint_with(**{key: value for key, value in spec.method.items() if key != "name"})
    classes, chans = (1000 if "imagenet" in recipe else 10), (1 if "mnist" in recipe else 3)
    model = models.create(spec.backbone.name, classes, chans).eval()
    channels = trace_groups(model, torch.zeros(1, chans, side, side))
    method.prepare(channels, spec.select.exclude, SelectionRequest.of(spec))
    found = method.pairs(channels)
    layers = [channels.layers[pair.child] for pair in found]
    assert len(found) == pairs
    assert sum(layer.width_in * layer.width_out * layer.kernel for layer in layers) == masked
    assert sum(len(pair.x) * len(pair.y) for pair in found) == scores


def masked_training(ranks: Communicator, folder: Path | None = None, kill: int = 0, **more) -> list[bool]:
    """100 updates of a masked network: whether all masked weights and momenta are zero, no others are, resumed."""
    method = mint_with(groups=8, p=(0.5,))
    bench, scores = digits(method)
    plan = method.select(scores, bench.graph, SelectionRequest())
    settings = {"epochs": 9, "batch": 16, "images": 200, "weight_decay": 1e-2, "momentum": 0.9, **more}
    found = trainer(ranks, folder, save_every_steps=9, **settings)
    surgeon.apply_plan(found.model, bench.graph, plan)
    found.masks = weight_masks(plan, bench.graph, found.model.state_dict())
    if kill:
        kill_after(found, kill)
        with pytest.raises(Killed):
            found.run()
        found.checkpoints.wait()  # type: ignore[union-attr]
        return masked_training(ranks, folder, **more)
    assert found.loop.steps_per_epoch * settings["epochs"] >= 100
    found.run()
    weights = found.model.state_dict()
    parameters = dict(found.model.named_parameters())
    rest = [bool((weights[name][mask] == 0).any()) for name, mask in found.masks.items()]
    states = [(mask, found.engine.optimizer.state[parameters[name]].values()) for name, mask in found.masks.items()]
    momenta = [value[~mask] for mask, values in states for value in values if value.shape == mask.shape]
    assert momenta
    clean = mask_violations(weights, found.masks) == [] and not any(bool(m.any()) for m in momenta)
    return [clean, not any(rest), (folder is None or found.resumed is not None)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw", "ema": 0.9, "nesterov": False}], ids=["sgd", "adamw-ema"])
def test_masked_weights_are_exact_zeros_after_a_hundred_updates(world, more, tmp_path, pool):
    """With momentum and weight decay, on one rank and two, killed and resumed from a checkpoint on the way."""
    for found in pool.run(world, trained_and_resumed, tmp_path, more):
        assert found == [True, True, True]


def trained_and_resumed(ranks: Communicator, folder: Path, more: dict) -> list[bool]:
    return masked_training(ranks, folder, 41, **more)


def test_the_method_is_found_by_its_name():
    assert methods.find("mint") is mint.Mint
    assert mint.Options().fidelity == "correct"
