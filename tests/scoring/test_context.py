"""The methods of the scoring context on real ranks."""

import os
import signal

import pytest
import torch

from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.pruning.hooks.statistics import State, Statistic
from tests.support import tiny


class PerSample(Statistic):
    """Gradient times activation, summed over space, per sample: what Fisher and Taylor criteria gather."""

    def states(self, point):
        return {"taylor": State("rows", (point.width,), torch.float64)}

    def update(self, point, tables, maps, ids, grads):
        tables["taylor"][ids] = (maps * grads).sum((2, 3))


def gradients(ranks: Communicator) -> dict[str, list]:
    context = tiny.bench(tiny.network(), ranks)
    points = [point for point in context.hook_points if point.kind == "conv"]
    return {
        point: tables["taylor"].tolist()
        for point, tables in context.collect(points, PerSample(), backward=True).items()
    }


def test_gradients_per_sample_are_the_same_for_every_world(pool):
    one = gradients(Communicator())
    for world in (2, 3):
        for found in pool.run(world, gradients):
            assert found == one


def test_gradients_are_right():
    """Against autograd on one image alone: micro-batches do not mix samples."""
    model = tiny.network()
    context = tiny.bench(model)
    found = gradients(Communicator())
    batch = next(context.loader.batches([context.ids[20:21]]))
    maps = {}
    hook = model.get_submodule("layer2.0.conv1").register_forward_hook(lambda m, i, y: maps.setdefault("y", y))
    loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
    hook.remove()
    (grad,) = torch.autograd.grad(loss, maps["y"])
    expected = (maps["y"] * grad).sum((0, 2, 3)).tolist()
    assert torch.allclose(torch.tensor(found["layer2.0.conv1"][20]), torch.tensor(expected), atol=1e-9)


def counts(ranks: Communicator) -> list[tuple[int, int]]:
    context = tiny.bench(tiny.network(), ranks)
    return [tiny.correct(context), tiny.correct(context, {"conv1": [0, 1, 2], "layer3.0.conv1": list(range(40))})]


def test_images_are_counted_alike_on_any_ranks_and_gated_off_is_cut(pool):
    found = [result for world in (1, 2, 3) for result in pool.run(world, counts)]
    assert all(result == found[0] for result in found)
    model = tiny.network()
    context = tiny.bench(model)
    from dist_prune.pruning.plan.plan import Plan

    plan = Plan(
        {"conv1": (0, 1, 2), "layer3.0.conv1": tuple(range(40))}, {g.name: g.width for g in context.graph.groups}
    )
    small = tiny.bench(tiny.cut(model, context.graph, plan))
    assert tiny.correct(small) == found[0][1]
    assert found[0][0][1] == tiny.IMAGES


def jobs(ranks: Communicator) -> list:
    context = tiny.bench(tiny.network(), ranks)
    return context.map_jobs(list("abcdefg"), lambda job: (job.upper(), ord(job)))


def test_share_gives_the_same_table_everywhere(pool):
    expected = [(job.upper(), ord(job)) for job in "abcdefg"]
    for world in (1, 2, 3):
        assert pool.run(world, jobs) == [expected] * world


def test_draws_are_named():
    context = tiny.bench(tiny.network(), seed=4)
    first = torch.rand(3, generator=context.generator("layer", 1))
    assert torch.equal(first, torch.rand(3, generator=context.generator("layer", 1)))
    assert not torch.equal(first, torch.rand(3, generator=context.generator("layer", 2)))


class Power(Statistic):
    """Counts positive values of a power: its setting decides the table."""

    def __init__(self, power: int):
        self.power = power

    def states(self, point):
        return {"n": State("sum", (point.width,))}

    def update(self, point, tables, maps, ids, grads):
        tables["n"] += ((maps**self.power).sum((2, 3)) > 1).sum(0)


def test_every_observation_has_its_own_partial(tmp_path):
    """Two statistics of one class, other points, gradients or not: none resumes from another's tables."""

    def tables(power: int, layers: int, partial) -> list:
        context = tiny.bench(tiny.network(), partial=partial)
        points = [point for point in context.hook_points if point.kind == "conv"][:layers]
        found = context.collect(points, Power(power))
        assert not context.resumed
        return [found[point.name]["n"].tolist() for point in points]

    for power, layers in ((1, 3), (2, 3), (2, 2)):
        assert tables(power, layers, tmp_path) == tables(power, layers, None)
    context = tiny.bench(tiny.network(), partial=tmp_path / "both")
    points = [point for point in context.hook_points if point.kind == "conv"]
    first, second = context.collect(points, Power(1)), context.collect(points, Power(2))
    assert not all(torch.equal(first[s.name]["n"], second[s.name]["n"]) for s in points)


@pytest.mark.parametrize("after", [1, 4, 8])
def test_asked_to_stop_in_any_round_nothing_seen_is_lost(tmp_path, monkeypatch, after):
    """53 images in 8 micro-batches: stopped after some of them, the last one included."""
    context = tiny.bench(tiny.network(), partial=tmp_path, save_every=100)
    points = [point for point in context.hook_points if point.kind == "conv"]
    whole = tiny.bench(tiny.network()).collect(points, Power(1))
    polls = iter([[0]] * (after - 1) + [[1]])
    with monkeypatch.context() as patched, pytest.raises(preemption.PreemptedError, match=f"after {after} of 8"):
        patched.setattr(preemption, "poll", lambda ranks: next(polls))
        context.collect(points, Power(1))
    again = tiny.bench(tiny.network(), partial=tmp_path)
    found = again.collect(points, Power(1))
    assert again.resumed == min(after * tiny.MICRO, tiny.IMAGES)
    assert all(torch.equal(found[s.name]["n"], whole[s.name]["n"]) for s in points)


def test_collectives_inside_a_job_are_refused():
    context = tiny.bench(tiny.network())
    with pytest.raises(PruneError, match=r"context\.all_reduce_sum_ was called inside a job"):
        context.map_jobs([1], lambda job: context.all_reduce_sum_([torch.tensor([job])]))
    assert context.map_jobs([1], lambda job: job) == [1]


def test_fit_leaves_the_network_as_it_was():
    model = tiny.network()
    context = tiny.bench(model)
    gate = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def loss(network, images, labels, ids):
        return torch.nn.functional.cross_entropy(network(images) * gate, labels, reduction="none")

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context.train_parameters([gate], loss, epochs=1, lr=0.1, batch=450)
    assert float(gate) != 1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradients_behind_an_in_place_activation():
    """The maps are the layer's raw output, whatever the network does to it afterwards."""
    from torch import nn

    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 6, 3), nn.ReLU(inplace), nn.Conv2d(6, 6, 3), nn.ReLU(inplace), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(96, 10)).double().eval()

    found = []
    for inplace in (False, True):
        context = tiny.bench(network(inplace))
        points = [point for point in context.hook_points if point.kind == "conv"]
        tables = context.collect(points, PerSample(), backward=True)
        found.append([tables[point.name]["taylor"] for point in points])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def shared(ranks, place, calls: int) -> tuple[list, int]:
    """The results of some calls of shared jobs, and how many jobs this rank had to do."""
    context = tiny.bench(tiny.network(), ranks, partial=place)
    done: list[int] = []

    def run(job: int) -> torch.Tensor:
        done.append(job)
        return torch.tensor([job, job**2])

    return [[t.tolist() for t in context.map_jobs(range(5 * c, 5 * c + 5), run)] for c in range(calls)], len(done)


def test_shared_jobs_that_are_done_are_not_done_again(tmp_path, pool):
    wanted = [[[j, j * j] for j in range(5 * c, 5 * c + 5)] for c in range(3)]
    for found, count in pool.run(2, shared, tmp_path, 2):
        assert found == wanted[:2]
        assert count in (4, 6)
    for found, count in pool.run(3, shared, tmp_path, 3):
        assert found == wanted
        assert count in (1, 2), "the third call's five jobs on three ranks"


def test_asked_to_stop_between_shared_jobs(tmp_path, monkeypatch):
    context = tiny.bench(tiny.network(), partial=tmp_path)
    context.map_jobs([1], torch.tensor)
    monkeypatch.setattr(preemption, "poll", lambda ranks, also=(): [1, *also])
    with pytest.raises(preemption.PreemptedError, match="in call 2 of shared jobs, before its first job"):
        context.map_jobs([2], torch.tensor)


def stopped_in(ranks: Communicator, place, at: int) -> tuple[str, int]:
    """Seven shared jobs; the rank that does the job ``at`` is signalled meanwhile."""
    context = tiny.bench(tiny.network(), ranks, partial=place)
    done: list[int] = []

    def run(job: int) -> torch.Tensor:
        done.append(job)
        if job == at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return torch.full((3,), job / 7, dtype=torch.float64)

    handlers = [signal.getsignal(number) for number in preemption.SIGNALS]
    preemption.install_handlers()
    try:
        found = context.map_jobs(range(7), run)
        return repr(torch.stack(found).tolist()), len(done)
    except preemption.PreemptedError as error:
        return str(error), len(done)
    finally:
        preemption._received.clear()
        for number, handler in zip(preemption.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def test_asked_to_stop_amid_shared_jobs_the_finished_ones_are_kept(tmp_path, pool):
    """Two ranks stop after their second round; three continue with the rest, and get the same bits."""
    (whole, _), *_ = pool.run(1, stopped_in, None, -1)
    for said, count in pool.run(2, stopped_in, tmp_path, 3):
        assert "in call 1 of shared jobs, after 4 of 7 jobs" in said
        assert count == 2
    assert pool.run(3, stopped_in, tmp_path, -1) == [(whole, 1)] * 3


def test_shared_jobs_are_saved_now_and_then(tmp_path, monkeypatch):
    """A process that is killed loses what it did since the last save, not the whole call."""
    monkeypatch.setattr("dist_prune.distributed.parallel_map.SAVE_S", 0)

    def dying(job: int) -> torch.Tensor:
        if job == 4:
            raise MemoryError
        return torch.tensor(job)

    with pytest.raises(MemoryError):
        tiny.bench(tiny.network(), partial=tmp_path).map_jobs(range(6), dying)
    left: list[int] = []
    found = tiny.bench(tiny.network(), partial=tmp_path).map_jobs(
        range(6), lambda job: left.append(job) or torch.tensor(job)
    )
    assert left == [4, 5]
    assert [int(value) for value in found] == list(range(6))


def test_scoring_keeps_cudnn_on():
    """torch's cudnn.flags() switches cuDNN off where it is not named: convolutions then take ten times as long."""
    from dist_prune.pruning.hooks import masked_accuracy
    from dist_prune.pruning.hooks.capture import reproducible_kernels

    with reproducible_kernels():
        assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.enabled
    context = tiny.bench(tiny.network())
    seen, plain = [], context.model.forward
    context.model.forward = lambda x: (seen.append(torch.backends.cudnn.enabled), plain(x))[1]  # type: ignore[assignment]
    for name in ("taylor", "shapley"):
        seen.clear()
        tiny.method(name).score(context)
        assert seen and all(seen), name
    assert masked_accuracy.reproducible_kernels is reproducible_kernels
