"""The laws that every method passes. Methods are found on disk; nothing here names one."""

import contextlib
import copy
import pickle
from dataclasses import replace

import pytest
import torch

from dist_prune import methods
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.hooks.statistics import Accumulator
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest, reachable
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.scoring.statistic_collection import collect_batch
from tests.support import tiny
from tests.support.pool import Pool

EMPTY = len(pickle.dumps([]))  # what a rank without a job sends
HALF = SelectionRequest(target=("macs", 0.5))
every_method = pytest.mark.parametrize("name", methods.list_names())


def plan_of(name: str, context: DistributedScoringContext, request: SelectionRequest = HALF) -> Plan:
    method = tiny.method(name)
    return method.select(method.score(context), context.graph, request)


def plan_on(ranks: Communicator, name: str, images: int = tiny.IMAGES) -> str:
    return plan_of(name, tiny.bench(tiny.network(), ranks, images=images)).fingerprint


def observed(name: str, context: DistributedScoringContext) -> list:
    """The (points, statistic, backward) of every statistic that a method collects."""
    calls = []
    plain = context.collect

    def spy(points, statistic, backward=False):
        calls.append((points, statistic, backward))
        return plain(points, statistic, backward)

    context.collect = spy  # type: ignore[method-assign]
    tiny.method(name).score(context)
    return calls


@every_method
def test_ranks_do_not_move_the_plan(name, pool):
    plans = {fingerprint for world in (1, 2, 3) for fingerprint in pool.run(world, plan_on, name)}
    assert len(plans) == 1


@every_method
def test_more_ranks_than_micro_batches(name, pool):
    plans = {fingerprint for world in (1, 3) for fingerprint in pool.run(world, plan_on, name, 9)}
    assert len(plans) == 1


@pytest.mark.slow
@every_method
def test_four_ranks_do_not_move_the_plan(name, pool4):
    plans = {fingerprint for world in (1, 4) for fingerprint in pool4.run(world, plan_on, name)}
    assert len(plans) == 1


@pytest.fixture(scope="module")
def pool16(tmp_path_factory):
    """Sixteen real gloo ranks (about 5 GB together)."""
    pool = Pool(16, tmp_path_factory.mktemp("pool16"), (8, 16))
    yield pool
    pool.close()


def plan_and_volume(ranks: Communicator, name: str) -> tuple[str, dict]:
    """On 112 images: sixteen micro-batches, so that each of sixteen ranks has one."""
    plan = plan_of(name, tiny.bench(tiny.network(), ranks, images=16 * tiny.MICRO)).fingerprint
    return plan, ranks.volume


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*methods.list_names()} - {"sensitivity"}))  # it trains: 16 trainings here
def test_many_ranks_do_not_move_the_plan_nor_say_more(name, pool16):
    """Eight and sixteen ranks: the plan of one, and no rank hands more to a reduction than it does among eight."""
    alone, _ = plan_and_volume(Communicator(), name)
    said = {}
    for world in (8, 16):
        found = pool16.run(world, plan_and_volume, name)
        assert {plan for plan, _ in found} == {alone}
        said[world] = [volume for _, volume in found]
        for word in ("sum", "rows", "min", "broadcast"):  # one bucket per word and dtype, whatever the world
            assert len({volume.get(word) for volume in said[world]}) == 1, word
    for word in ("sum", "rows", "min", "broadcast"):
        assert said[8][0].get(word) == said[16][0].get(word), word
    polls = {world: volumes[0].get("max", (0, 0))[0] for world, volumes in said.items()}
    assert polls[16] <= polls[8], "ranks agree once per round, and there are fewer rounds"
    for world, volumes in said.items():  # dealt jobs: together the ranks send each result once, and an empty list
        sent = sum(volume.get("gather", (0, 0))[1] for volume in volumes)
        calls = sum(volume.get("gather", (0, 0))[0] for volume in volumes)
        said[world] = sent - calls * EMPTY
    assert said[16] <= 1.05 * said[8] + 64 * 16


@every_method
def test_parts_merge_to_the_whole(name):
    context = tiny.bench(tiny.network())
    for points, statistic, backward in observed(name, context):
        whole, *parts = (Accumulator(statistic, points, context.images, torch.device("cpu")) for _ in range(4))
        lists = [torch.arange(i, min(i + tiny.MICRO, context.images)) for i in range(0, context.images, tiny.MICRO)]
        for number, positions in enumerate(lists):
            batch = next(context.loader.batches([context.ids[positions.numpy()]]))
            for accumulator in (whole, parts[number % 3]):
                part = replace(batch, images=batch.images.clone())
                collect_batch(context.model, points, accumulator, part, positions, context.task if backward else None)
        for part in parts[1:]:
            parts[0].merge(part)
        assert whole.state_dict().keys() == parts[0].state_dict().keys()
        for key, table in whole.state_dict().items():
            assert torch.equal(table, parts[0].state_dict()[key]), key


@every_method
def test_a_fresh_state_is_the_identity(name):
    context = tiny.bench(tiny.network())
    for points, statistic, backward in observed(name, context):
        accumulator, fresh = (Accumulator(statistic, points, context.images, torch.device("cpu")) for _ in range(2))
        positions = torch.arange(tiny.MICRO)
        batch = next(context.loader.batches([context.ids[: tiny.MICRO]]))
        collect_batch(context.model, points, accumulator, batch, positions, context.task if backward else None)
        before = {key: table.clone() for key, table in accumulator.state_dict().items()}
        accumulator.merge(fresh)
        assert all(torch.equal(table, before[key]) for key, table in accumulator.state_dict().items())
        fresh.merge(accumulator)
        assert all(torch.equal(table, before[key]) for key, table in fresh.state_dict().items())


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 2) for name in methods.list_names()), ("taylor", 0), ("entropy", 1)]
)
def test_the_loader_does_not_move_the_plan(name, workers, tmp_path):
    """The same pixels from memory and from PNG files through a DataLoader with any number of workers."""
    from PIL import Image

    source = open_source("digits", None, "", True)
    assert isinstance(source, ArraySource)
    rgb = source.images[: tiny.IMAGES].repeat(3, axis=3)
    order = sorted(range(tiny.IMAGES), key=lambda i: (source.labels[i], i))  # a folder's order: by class, by name
    for i in range(tiny.IMAGES):
        folder = tmp_path / "train" / str(source.labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb[i]).save(folder / f"{i:04}.png")
    memory = ArraySource(rgb[order], source.labels[order], source.classes)
    files = open_source("imagefolder", str(tmp_path), "train", True)
    model = tiny.network(in_chans=3)
    plans = {
        plan_of(name, tiny.bench(copy.deepcopy(model), feed=tiny.feed_of(memory))).fingerprint,
        plan_of(name, tiny.bench(copy.deepcopy(model), feed=tiny.feed_of(files, workers=workers))).fingerprint,
    }
    assert len(plans) == 1


@every_method
def test_select_is_pure(name):
    context = tiny.bench(tiny.network())
    method = tiny.method(name)
    scores = method.score(context)
    before = {key: tensor.clone() for key, tensor in scores.items()}
    state = torch.get_rng_state()
    first = method.select(scores, context.graph, HALF)
    torch.manual_seed(99)
    second = tiny.method(name).select(scores, context.graph, HALF)
    torch.set_rng_state(state)
    method.select(scores, context.graph, HALF)
    assert torch.equal(state, torch.get_rng_state())
    assert first.canonical() == second.canonical()
    assert scores.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in scores.items())


@every_method
def test_scoring_leaves_the_network_as_it_was(name):
    model = tiny.network()
    model.train()
    model.get_submodule("layer2").eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    method = tiny.method(name)
    method.score(tiny.bench(model))
    if not method.trains_weights:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks for m in model.modules())
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) and p.requires_grad for p in model.parameters())


@every_method
def test_same_seed_same_fingerprint(name):
    plans = [plan_of(name, tiny.bench(tiny.network(), seed=3)).fingerprint for _ in range(2)]
    assert plans[0] == plans[1]


@every_method
def test_a_replayed_plan_loads_strictly_and_computes_the_same(name):
    model = tiny.network()
    context = tiny.bench(model)
    plan = plan_of(name, context)
    small = tiny.cut(model, context.graph, plan)
    again = tiny.cut(model, trace_groups(model, tiny.example()[:1]), Plan.from_json(plan.to_json()))
    rebuilt = rebuild(tiny.network(seed=7), plan, small.state_dict()).eval()
    x = tiny.example()
    assert not plan.empty
    assert torch.equal(small(x), again(x))
    assert torch.equal(small(x), rebuilt(x))
    assert str(rebuilt) == str(small)


@every_method
def test_gated_off_is_removed(name):
    model = tiny.network()
    context = tiny.bench(model)
    plan = plan_of(name, context)
    small, x = tiny.cut(model, context.graph, plan), tiny.example()
    dense = model(x)
    with gate_off(model, context.graph, plan.removed):
        switched = model(x)
    assert torch.allclose(switched, small(x), atol=1e-10, rtol=0)
    assert not torch.allclose(dense, switched, atol=1e-3)
    assert torch.equal(dense, model(x)), "the gates are gone afterwards"


@every_method
def test_at_least_one_channel_survives(name):
    context = tiny.bench(tiny.network())
    low, _ = reachable(tiny.method(name).prunable(context.graph), HALF, "macs")
    plan = plan_of(name, context, SelectionRequest(target=("macs", low)))
    assert min(plan.counts.values()) == 1
    tiny.cut(context.model, context.graph, plan)(tiny.example())


@every_method
def test_a_plan_that_removes_nothing_says_so(name):
    plan = plan_of(name, tiny.bench(tiny.network()), SelectionRequest(target=("macs", 1.0), min_channels=10_000))
    assert plan.empty
    assert all(plan.reasons[group] for group in plan.widths)


@every_method
def test_permuting_channels_permutes_the_plan(name):
    if not methods.find(name).equivariant:
        return  # the method says that it has no such symmetry
    model = tiny.network()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    turned = copy.deepcopy(model)
    block = turned.get_submodule("layer2.0")
    for layer, keys in (("conv1", ["weight"]), ("bn1", ["weight", "bias", "running_mean", "running_var"])):
        for key in keys:
            tensor = getattr(getattr(block, layer), key)
            tensor.data = tensor.data[order]
    block.conv2.weight.data = block.conv2.weight.data[:, order]  # type: ignore[union-attr]
    assert torch.allclose(model(tiny.example()), turned(tiny.example()))
    plain, other = plan_of(name, tiny.bench(model)), plan_of(name, tiny.bench(turned))
    assert {int(order[i]) for i in other.kept("layer2.0.conv1")} == set(plain.kept("layer2.0.conv1"))
    assert {g: r for g, r in other.removed.items() if g != "layer2.0.conv1"} == {
        g: r for g, r in plain.removed.items() if g != "layer2.0.conv1"
    }


class Killed(BaseException):
    """Stands for the end of a process: nothing in the package catches it."""


def killed_after(batches: int, context: DistributedScoringContext) -> None:
    plain = context.loader.batches

    def dying(dealt, augment=None):
        for number, batch in enumerate(plain(dealt, augment)):
            if number == batches:
                raise Killed
            yield batch

    context.loader.batches = dying  # type: ignore[method-assign]


def killed(ranks: Communicator, name: str, partial, batches: int) -> None:
    context = tiny.bench(tiny.network(), ranks, partial=partial)
    killed_after(batches, context)
    with contextlib.suppress(Killed):
        plan_of(name, context)


def resumed(ranks: Communicator, name: str, partial) -> tuple[str, int]:
    context = tiny.bench(tiny.network(), ranks, partial=partial)
    return plan_of(name, context).fingerprint, context.resumed


@pytest.mark.parametrize(
    ("name", "batches", "before", "after"),
    [
        *((name, *counts) for name in methods.list_names() for counts in [(5, 1, 3), (1, 3, 1)]),
        *((name, *counts) for name in ("graph", "mint", "taylor") for counts in [(2, 1, 1), (2, 2, 3), (2, 2, 2)]),
    ],
)
def test_killed_in_scoring_and_resumed_is_never_killed(name, batches, before, after, tmp_path, pool):
    """Killed on some ranks, resumed on as many or on another number of them, and once more when all is done."""
    context = tiny.bench(tiny.network())
    whole, observes = plan_of(name, context).fingerprint, bool(context._observations)
    pool.run(before, killed, name, tmp_path, batches)
    for found, images in pool.run(after, resumed, name, tmp_path):
        assert found == whole
        assert not observes or 0 < images < tiny.IMAGES
    assert not observes or resumed(Communicator(), name, tmp_path) == (whole, tiny.IMAGES)
