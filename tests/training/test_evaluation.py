"""Accuracy is exact for every world, and the pretrained networks score what their README states."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_prune import models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import tiny


def digits(ranks: Communicator, batch: int) -> dict[str, float]:
    return evaluate(tiny.network(), tiny.digits_feed(), batch, ranks, Tracker(False))


def test_worlds_and_batches_agree_to_the_bit(pool):
    found = [result for world in (1, 2, 3) for result in pool.run(world, digits, 100)]
    found += [digits(Communicator(), batch) for batch in (1347, 32)]
    assert all(result == found[0] for result in found)
    assert found[0]["images"] == 1347


def passes(ranks: Communicator) -> tuple[dict[str, float], int]:
    """The figures of 5 batches, and how many forward passes this rank made."""
    model, count = tiny.network(), []
    model.register_forward_hook(lambda *_: count.append(1))
    return evaluate(model, tiny.digits_feed(), 300, ranks, Tracker(False)), len(count)


def test_ranks_without_a_batch_make_its_forward_pass_all_the_same(pool):
    """Weights sharded by ZeRO-3 are gathered in every forward pass: a rank that leaves one out stops the others."""
    (figures, count), *_ = pool.run(1, passes)
    assert count == 5
    assert pool.run(2, passes) == [(figures, 3)] * 2
    assert pool.run(3, passes) == [(figures, 2)] * 3


def test_against_plain_arithmetic():
    feed = tiny.digits_feed()
    model = tiny.network()
    batch = next(feed.batches([np.arange(1347)]))
    with torch.no_grad():
        logits = model(batch.images)
    found = digits(Communicator(), 100)
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == batch.labels).double().mean()), abs=1e-9)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch.labels)), abs=1e-6)


def answered(ranks: Communicator, ids: list[int] | None = None) -> dict[str, list[int]]:
    kept: dict[str, torch.Tensor] = {}
    chosen = None if ids is None else np.array(ids)
    evaluate(tiny.network(), tiny.digits_feed(), 100, ranks, Tracker(False), ids=chosen, kept=kept)
    return {name: table.tolist() for name, table in kept.items()}


def test_answers_are_those_of_the_network_on_any_number_of_ranks(pool):
    feed = tiny.digits_feed()
    batch = next(feed.batches([np.arange(1347)]))
    with torch.no_grad():
        shares = torch.softmax(tiny.network()(batch.images).double(), 1)
    alone = answered(Communicator())
    assert alone["predicted"] == shares.argmax(1).tolist()
    assert torch.tensor(alone["confidence"]) / 2**24 == pytest.approx(shares.amax(1), abs=1e-6)
    for world in (1, 2, 3):
        assert pool.run(world, answered) == [alone] * world
    some = [3, 400, 1200]
    assert answered(Communicator(), some)["predicted"] == [alone["predicted"][number] for number in some]


def test_answers_are_kept_only_where_they_are_asked_for():
    figures = evaluate(tiny.network(), tiny.digits_feed(), 100, Communicator(), Tracker(False))
    assert not {"predicted", "confidence"} & figures.keys()


def cifar(ranks: Communicator, place: Path, depth: int) -> float:
    model = models.create(f"resnet{depth}_cifar", 10, 3)
    weights = tensor_files.read_weights(place / f"weights/resnet{depth}_cifar10.safetensors")
    tensor_files.load_strictly(model, weights, "the file")
    source = open_source("npz", str(place / "cifar10.npz"), "", False)
    feed = ImageLoader(source, TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), torch.device("cpu"))
    return evaluate(model, feed, 250, ranks, Tracker(False))["top1"]


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "top1"), [(20, 91.73), (56, 93.39)])
def test_pretrained_networks_score_what_is_stated(depth, top1, pool, data):
    for found in pool.run(2, cifar, data, depth):
        assert found == pytest.approx(top1, abs=0.005)


@pytest.mark.parametrize("scale", [1e5, 1e12, float("nan")])
def test_a_diverged_network_has_no_loss(scale):
    """Large, absurd and not finite logits: nan where the sum would not be exact, never an invented figure."""
    model = tiny.network()
    model.get_submodule("linear").weight.data.mul_(scale)  # type: ignore[union-attr]
    found = evaluate(model, tiny.digits_feed(), 100, Communicator(), Tracker(False))
    assert found["loss"] != found["loss"]
    assert found["images"] == 1347
