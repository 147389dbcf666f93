"""The one loop: worlds agree, an interrupted run ends where an uninterrupted one does, rates follow the schedule."""

import math
from pathlib import Path

import pytest
import torch

from dist_prune.errors import PruneError
from dist_prune.recipe import Training
from dist_prune.runtime import training
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.data.feed import Feed, Look
from dist_prune.runtime.data.sources import open_source
from dist_prune.runtime.tracking import Tracker
from tests import tiny


def loop(ranks: Ranks | None = None, **settings) -> training.Loop:
    look = Look(8, (0.3,), (0.4,), augment="crop_flip")
    feed = Feed(open_source("digits", None, "", True), look, torch.device("cpu"), dtype=torch.float64)
    values = {"epochs": 3, "batch": 32, "lr": 0.05, "images": 200, **settings}
    return training.Loop(Training(**values), feed, tiny.machine(ranks), Tracker(False), 0)


def digest(model) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in model.state_dict().values())


def run(saves: Path | None, identity: str = "a", **settings):
    model = tiny.network()
    history = training.train(model, loop(**settings), lambda m: {"top1": 0.0}, saves, identity)
    return digest(model), history


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("epoch", [1, 2])
def test_stopped_and_run_again_is_never_stopped(tmp_path, epoch):
    whole, _ = run(None)

    def stop(_model):
        calls.append(1)
        if len(calls) == epoch + 1:
            raise Stopped
        return {}

    calls: list[int] = []
    saves = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        training.train(tiny.network(), loop(), stop, saves, "a")
    found, history = run(saves)
    assert found == whole
    assert [line["epoch"] for line in history] == [1, 2, 3]


def test_a_checkpoint_of_another_run_is_ignored(tmp_path):
    saves = tmp_path / "checkpoint.safetensors"
    run(saves, "a", epochs=2)
    assert run(saves, "b")[0] == run(None)[0]


def test_training_learns():
    model = tiny.network()
    history = training.train(model, loop(epochs=6, images=1000), lambda m: {}, None)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]


def gates(ranks: Ranks, batch: int) -> list[float]:
    """Learn one gate per channel of a layer through the bench's fit."""
    model = tiny.network()
    bench = tiny.bench(model, ranks)
    gate = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))

    def loss(network, images, labels, ids):
        layer = network.get_submodule("layer1.0.bn1")
        hook = layer.register_forward_hook(lambda m, i, y: y * gate[None, :, None, None])
        try:
            return torch.nn.functional.cross_entropy(network(images), labels, reduction="none")
        finally:
            hook.remove()

    steps: list[int] = []
    bench.feed.look = Look(8, (0.3,), (0.4,))  # type: ignore[misc]
    history = bench.fit([gate], loss, epochs=1, lr=0.1, batch=batch, watch=steps.append)
    assert len(history) == 1
    assert steps == list(range(-(-1347 // batch)))
    return gate.tolist()


def test_fit_agrees_over_worlds(pool):
    one = gates(Ranks(), 450)
    assert max(abs(value - 1) for value in one) > 1e-3
    for world in (2, 3):
        for found in pool.run(world, gates, 450):
            assert found == pytest.approx(one, abs=1e-12)


def test_a_loss_that_is_not_finite_stops_with_the_place():
    with pytest.raises(PruneError, match=r"not finite at epoch 1, step \d+, learning rate 1e\+30 \(sample ids \["):
        run(None, lr=1e30, schedule="constant")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "step", "step_size": 2}, [1, 1, 0.1, 0.1]),
        ({"schedule": "multistep", "milestones": (1, 3), "gamma": 0.5}, [1, 0.5, 0.5, 0.25]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]),
        ({"schedule": "cosine", "warmup_epochs": 2}, [0.0005, 0.5005, 1, 0.5]),
    ],
)
def test_schedules(settings, expected):
    found = loop(epochs=4, lr=1.0, **settings)
    assert [found.rate(epoch) for epoch in range(4)] == pytest.approx(expected, abs=1e-6)
