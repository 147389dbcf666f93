"""The Sensitivity Pruner on real digits and real ranks: worlds, rounds, resume, quirks, requests."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_prune import models
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.base import TRAINED
from dist_prune.methods.sensitivity.method import Options, Sensitivity, Shot, stage_name
from dist_prune.methods.sensitivity.snip import sensitivities
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.training.sync_batchnorm import CrossRankBatchNorm
from tests.support import tiny

QUICK = {"keep": 0.5, "epochs": 2, "batch": 12, "beta": (20.0, 100.0), "beta_every": 2, "window": 4, "bump_points": 1}


def method(**more) -> Sensitivity:
    return Sensitivity(Options(**{**QUICK, **more}))


def channels_of(name: str, size: int = 32, classes: int = 10):
    model = models.create(name, classes, 3).eval()
    return trace_groups(model, torch.zeros(1, 3, size, size))


def summed(logits, labels):
    return functional.cross_entropy(logits, labels, reduction="sum")


def scored(ranks: Communicator, folder=None, **more) -> dict:
    return method(**more).score(tiny.bench(tiny.network(), ranks, partial=folder))


def plan_and_weights(ranks: Communicator) -> tuple[str, dict[str, list], int]:
    scores = scored(ranks)
    plan = method().select(scores, tiny.bench(tiny.network()).graph, SelectionRequest())
    weights = {n: t.flatten().tolist() for n, t in scores.items() if t.is_floating_point()}
    return plan.fingerprint, weights, len(plan.removed)


def test_one_global_batch_whatever_the_ranks(pool):
    """Plans are equal; weights, masks, lambda and beta to the order of sums."""
    found = [item for world in (1, 2) for item in pool.run(world, plan_and_weights)]
    plan, weights, cut = found[0]
    assert cut == 3
    for other, values, _ in found[1:]:
        assert other == plan
        for name, table in weights.items():
            assert values[name] == pytest.approx(table, rel=1e-7, abs=1e-9), name


def parts(ranks: Communicator) -> tuple[list[float], list[float]]:
    """(|summed gradient|, mean over ranks of |gradient|) of one layer, 13 images dealt out unevenly."""
    model, name = tiny.network().train(), "layer2.0.conv1"
    batch = next(tiny.digits_feed().batches([tiny.bench(model).ids[:13]]))
    mine = torch.arange(13).tensor_split([5, 6][: ranks.world - 1])[ranks.rank]
    weights = {name: model.get_parameter(f"{name}.weight")}
    with CrossRankBatchNorm(ranks) if ranks.world > 1 else contextlib.nullcontext():
        signed = sensitivities(
            lambda tensors: ranks.all_reduce("sum", tensors),
            model,
            weights,
            batch.images[mine],
            batch.labels[mine],
            summed,
        )[name]
        own = sensitivities(lambda t: None, model, weights, batch.images[mine], batch.labels[mine], summed)[name]
    mean = own.abs()
    ranks.all_reduce("sum", [mean])
    return signed.abs().flatten().tolist(), (mean / ranks.world).flatten().tolist()


def test_signed_gradients_are_summed_before_the_absolute_value(pool):
    right, same = parts(Communicator())
    assert right == same
    for world in (2, 3):
        for summed_first, wrong in pool.run(world, parts):
            assert summed_first == pytest.approx(right, rel=1e-9, abs=1e-12)
            assert wrong != pytest.approx(right, rel=1e-2)


def normed(ranks: Communicator) -> list[list[float]]:
    """Outputs' sum, gradients and running statistics of a small network on uneven parts; one rank of three has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    model = model.double().train()
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = torch.arange(7).tensor_split([4, 7][: ranks.world - 1])[ranks.rank]
    with CrossRankBatchNorm(ranks) if ranks.world > 1 else contextlib.nullcontext():
        loss = model(x[mine]).sin().sum()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    ranks.all_reduce("sum", grads)
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    return [t.flatten().tolist() for t in (*grads, *buffers)]


def test_norms_together_are_the_norms_of_the_whole_batch(pool):
    wanted = normed(Communicator())
    for world in (2, 3):
        for found in pool.run(world, normed):
            for ours, theirs in zip(found, wanted, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def stopped_at(ranks: Communicator, folder, step: int) -> None:
    """Asked to stop after so many polls of a round's loop; what is there stays in ``folder``."""
    plain, seen = preemption.poll, [0]

    def poll(among: Communicator, also=()):
        seen[0] += 1
        found = plain(among, also)
        return [1, *found[1:]] if seen[0] == step else found

    preemption.poll = poll
    try:
        with contextlib.suppress(preemption.PreemptedError):
            scored(ranks, folder)
            raise AssertionError("it was not stopped")
    finally:
        preemption.poll = plain


def resumed(ranks: Communicator, folder) -> tuple[dict[str, list], list[int]]:
    """The scores, and how many updates each round made."""
    bench, steps = tiny.bench(tiny.network(), ranks, partial=folder), []
    plain = bench.train_parameters

    def fit(parameters, loss, epochs, lr, batch, watch, **more):
        made = [0]

        def noted(step):
            made[0] += 1
            return watch(step)

        history = plain(parameters, loss, epochs, lr, batch, noted, **more)
        steps.append(made[0])
        return history

    bench.train_parameters = fit  # type: ignore[method-assign]
    scores = method().score(bench)
    return {name: table.flatten().tolist() for name, table in scores.items()}, steps


@pytest.mark.parametrize(("world", "step", "left"), [(1, 3, (5, 8, 8)), (1, 16, (0, 3, 8)), (2, 24, (0, 0, 4))])
def test_a_stopped_run_goes_on_at_the_step_and_repeats_no_round(world, step, left, tmp_path, pool):
    """Three rounds of 8 updates and an evaluation per epoch, which polls as well; bit for bit the uninterrupted run."""
    whole = pool.run(world, resumed, None)[0]
    pool.run(world, stopped_at, tmp_path, step)
    scores, steps = pool.run(world, resumed, tmp_path)[0]
    assert whole[1] == [8, 8, 8]
    assert tuple(steps) == left
    assert scores == whole[0]


def test_trained_weights_come_with_the_plan():
    model = tiny.network()
    bench = tiny.bench(model)
    scores = method().score(bench)
    before = model.state_dict()
    trained = {n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)}
    assert trained.keys() == before.keys()
    plan = method().select(scores, bench.graph, SelectionRequest())
    assert plan.removed
    changed = [n for n in trained if "weight" in n and not torch.equal(trained[n], before[n])]
    assert len(changed) == sum("weight" in n for n in before), "masks and weights are learned together"
    for group in plan.removed:
        assert scores[f"{group}:mask"].nonzero().flatten().tolist() == plan.kept(group)


def test_a_target_ranks_by_the_masks():
    bench = tiny.bench(tiny.network())
    scores = method().score(bench)
    learned = method().select(scores, bench.graph, SelectionRequest())
    for ratio in (0.2, 0.8):
        plan = method().select(scores, bench.graph, SelectionRequest(keep_ratio=ratio))
        for group in learned.removed:
            one, two = set(learned.kept(group)), set(plan.kept(group))
            assert one <= two or two <= one
    floors = method().select(scores, bench.graph, SelectionRequest(min_channels=10, round_to=4))
    assert all(count % 4 == 0 and count >= 10 for group, count in floors.counts.items() if group in learned.removed)


@pytest.mark.parametrize(
    ("more", "request_", "said"),
    [
        ({}, SelectionRequest(threshold=0.5), "the masks are learned"),
        ({}, SelectionRequest(keep_ratio=0.5, target=("macs", 0.9)), "set one of"),
        ({"skip": ["layer9.*"]}, SelectionRequest(), "method.skip: layer9"),
        ({"rounds": "2-5"}, SelectionRequest(), "rounds of this network, 1-3"),
    ],
)
def test_what_makes_no_sense_is_refused(more, request_, said):
    found = method(**more)
    channels = found.prunable(tiny.bench(tiny.network()).graph)
    with pytest.raises(PruneError, match=said):
        found.check(channels, request_)
    with pytest.raises(PruneError, match="method.skip"):
        method().prepare(channels, ("layer1.*",), SelectionRequest())


def test_rounds_of_the_papers_networks():
    """Bottlenecks by stage, VGG by layer, MobileNetV2 by expansion stages and its last convolution."""
    r50 = Sensitivity(Options(skip=("conv1",)))
    channels = r50.prunable(channels_of("resnet50_stem3"))
    assert [len(groups) for groups in r50.rounds(channels)] == [6, 8, 12, 6]
    assert sum(group.width for group in channels.free) == 7552
    mobile = Sensitivity(Options(skip=("conv_stem", "blocks.0.*", "blocks.6.0.conv_pwl")))
    channels = mobile.prunable(channels_of("mobilenetv2_100", 64))
    assert [len(groups) for groups in mobile.rounds(channels)] == [2, 3, 4, 3, 3, 1, 1]
    assert sum(group.width for group in channels.free) == 8384
    vgg = Sensitivity(Options(by="layer", pool="layers"))
    channels = vgg.prunable(channels_of("vgg16_bn_head_cifar"))
    assert [len(groups) for groups in vgg.rounds(channels)] == [1] * 13
    some = Sensitivity(Options(by="layer", rounds="3-5"))
    assert [(n, g[0].name) for n, g in some.selected_rounds(channels)] == [
        (3, "features.7"),
        (4, "features.10"),
        (5, "features.14"),
    ]
    assert [stage_name(n) for n in ("layer1.0.conv1", "s1.b2.conv3.conv", "conv_head")] == ["layer1", "s1", "conv_head"]


def test_the_pool_is_what_the_programs_score():
    model = models.create("vgg16_bn_head_cifar", 10, 3)
    found = Sensitivity(Options(by="layer", pool="layers"))
    channels = found.prunable(trace_groups(model.eval(), torch.zeros(1, 3, 32, 32)))

    class Bench:
        def clone_model(self):
            return copy.deepcopy(model)

    def pooled(**more) -> int:
        paper = Sensitivity(Options(by="layer", **more))
        shot = Shot(paper, Bench(), channels, found.rounds(channels)[0], 1)  # type: ignore[arg-type]
        return sum(len(weight) for weight in shot.weights.values())

    assert pooled(pool="layers") == 4234
    assert pooled(pool="kind") == pooled(pool="prunable") == 4224
    assert pooled(sort="layer", total="layer") == 64


def test_rounds_that_are_not_asked_for_stay_whole():
    bench = tiny.bench(tiny.network())
    found = method(rounds="2")
    plan = found.select(found.score(bench), bench.graph, SelectionRequest())
    assert list(plan.removed) == ["layer2.0.conv1"]
    assert "method.rounds" in plan.reasons["layer1.0.conv1"]


def test_every_quirk_changes_the_scores_and_as_released_is_all_of_them():
    quirks = ("raw_logits", "reshape", "small_mask", "fresh_norms")

    def soft(**more) -> list[float]:
        return scored(Communicator(), epochs=1, rounds="2", **more)["layer2.0.conv1:soft"].tolist()

    plain = soft()
    assert soft() == plain
    assert all(soft(quirks=(quirk,)) != plain for quirk in quirks)
    assert all(method(fidelity="as_released").has(quirk) for quirk in (*quirks, "padding_32"))
    target = scored(Communicator(), rounds="2", quirks=("small_mask",))["layer2.0.conv1:course"][:, 3]
    assert target.tolist() == [1.0] * len(target), "every filter of the layer being pruned enters the target"


def test_the_wide_pad_reaches_the_training_images():
    bench, pads = tiny.bench(tiny.network()), []
    plain = type(bench.loader).batches

    def batches(self, dealt, augment=None):
        pads.append((augment is not None, self.transform.padding))
        return plain(self, dealt, augment)

    type(bench.loader).batches = batches
    try:
        method(epochs=1, rounds="1", quirks=("padding_32",)).score(bench)
    finally:
        type(bench.loader).batches = plain
    assert (True, 32) in pads


def test_the_report_s_rows():
    bench = tiny.bench(tiny.network())
    rows = method().table(method().score(bench), bench.graph, SelectionRequest())
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert {"beta", "lambda", "kept", "target", "loss", "held_out_top1"} <= row.keys()
        assert 0 < row["kept"] <= 1
        assert row["beta"] >= 20
        assert 0.05 <= row["target"] <= 1
