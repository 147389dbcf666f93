"""Towers without labels: the criterion against brute force, CKA and k-NN against other programs, ranks, checkpoints."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import dist_prune as dp
from dist_prune import models, tasks
from dist_prune.config.data import Backbone
from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import Batch
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.models.load_checkpoint import load_checkpoint
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.tasks.similarity import linear_cka, neighbour_classes
from dist_prune.training.evaluation import Gallery, evaluate
from dist_prune.training.tracking import Tracker
from tests.support import tiny


class Small(nn.Module):
    """Two layers whose channels reach the features by a linear map: zeroing a channel changes them exactly linearly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 3)
        self.body.weight.data *= torch.linspace(0.2, 2, 6)[:, None, None, None]
        self.double().eval()

    def forward(self, images):
        maps = self.out(self.body(images).relu())
        return {"pooled": maps.mean((2, 3)), "patches": maps}


def without(channel: int) -> Small:
    network = Small()
    network.body.weight.data[channel] = 0
    network.body.bias.data[channel] = 0  # type: ignore[union-attr]
    return network


@pytest.mark.parametrize("weights", [{}, {"pooled": 2.0}, {"pooled": 0.5, "patches": 3.0}])
def test_fisher_estimates_the_distance_that_removing_a_channel_costs(weights):
    """With mse and a linear map to the features the second-order distance is exact: only the signs are random."""
    feed = tiny.digits_feed()
    task = tasks.build({"name": "features", "distance": "mse", "weights": weights})
    (batch,) = feed.batches([np.arange(1300)])
    network = Small()
    with torch.no_grad():
        dense = network(batch.images)
        wanted = torch.stack([task.distil(without(c)(batch.images), dense, 1.0).mean() for c in range(6)])
        assert task.distil(dense, dense, 1.0).abs().max() == 0
    graph = dp.trace(network, (1, 8, 8))
    images = [(part, torch.full((len(part),), -7)) for part in batch.images.split(100)]
    scores = dp.score(network, graph, "fisher", images, task=task, micro_batch=50)
    found = scores["body"]
    assert ((2 * found - wanted).abs() < 0.2 * wanted).all()
    assert found.argsort().tolist() == wanted.argsort().tolist()


def test_the_distance_itself_has_no_gradient_at_the_dense_network_and_the_criterion_has():
    (batch,) = tiny.digits_feed().batches([np.arange(4)])
    network, task = Small(), tasks.build({"name": "features"})
    with torch.no_grad():
        dense = network(batch.images)
    weight = network.body.weight
    (flat,) = torch.autograd.grad(task.distil(network(batch.images), dense, 1.0).sum(), weight)
    assert flat.abs().max() < 1e-12
    (steep,) = torch.autograd.grad(task.loss(network(batch.images), batch).sum(), weight)
    assert steep.abs().max() > 1e-4


def test_the_mean_hessian_of_the_criterion_is_that_of_the_distance():
    (batch,) = tiny.digits_feed().batches([np.arange(1)])
    network, task = Small(), tasks.build({"name": "features"})
    with torch.no_grad():
        dense = network(batch.images)

    def gated(gates, function):
        maps = network.out(network.body(batch.images).relu() * gates[None, :, None, None])
        return function({"pooled": maps.mean((2, 3)), "patches": maps})

    ones = torch.ones(6, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian
    wanted = hessian(lambda gates: gated(gates, lambda out: task.distil(out, dense, 1.0).sum()), ones)
    drawn = []
    for number in range(200):
        ids = Batch(batch.images, batch.labels, torch.tensor([number]))
        drawn.append(hessian(lambda gates, ids=ids: gated(gates, lambda out: task.loss(out, ids).sum()), ones))
    mean, error = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 200**0.5
    assert ((mean - wanted).abs() < 4 * error + 1e-9).all()
    assert (wanted.abs() > 4 * error).any()


def test_signs_follow_from_the_sample_id_alone():
    (batch,) = tiny.digits_feed().batches([np.arange(9)])
    network, task = Small(), tasks.build({"name": "features"})
    whole = task.loss(network(batch.images), batch)
    parts = [
        task.loss(network(batch.images[i : i + 1]), Batch(batch.images[i : i + 1], batch.labels, batch.ids[i : i + 1]))
        for i in range(9)
    ]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-12, atol=0)


def test_taylor_without_labels_is_the_same_on_two_ranks(pool):
    one = taylor_scores(tiny.machine().comm)
    two = pool.run(2, taylor_scores)
    for name in one:
        assert torch.equal(one[name], two[0][name])
        assert torch.equal(one[name], two[1][name])
    assert max(float(table.abs().max()) for table in one.values()) > 0


def taylor_scores(ranks):
    context = tiny.bench(tiny.network(), ranks)
    context.task = tasks.build({"name": "features"})
    return tiny.method("taylor").score(context)


@pytest.mark.parametrize("count", [12, 60])  # fewer and more images than channels
def test_cka_is_that_of_its_definition_and_ignores_rotation_and_scale(count):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, 20, generator=generator, dtype=torch.float64)
    second = torch.cat([first[:, :10] * 2, torch.randn(count, 21, generator=generator, dtype=torch.float64)], 1)
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    kernels = [centre @ features @ features.T @ centre for features in (first, second)]
    inner = [float((a * b).sum()) for a, b in itertools.combinations_with_replacement(kernels, 2)]
    assert abs(linear_cka(first, second) - inner[1] / (inner[0] * inner[2]) ** 0.5) < 1e-12
    turned = first @ torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0] * 3 + 5
    assert abs(linear_cka(first, turned) - 1) < 1e-12
    assert linear_cka(first, torch.ones(count, 3).double()) != linear_cka(first, torch.ones(count, 3).double())  # nan


def test_neighbours_are_those_of_scikit_learn():
    train, test = (open_source("digits", None, "", split) for split in (True, False))
    flat = [torch.from_numpy(source.images.reshape(len(source.labels), -1)).double() for source in (train, test)]
    other = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    )
    other.fit(flat[0].numpy(), train.labels)
    found = neighbour_classes(flat[1], flat[0], torch.from_numpy(train.labels), 20).numpy()
    assert (found == other.predict(flat[1].numpy())).all()
    assert (found == test.labels).mean() > 0.95


def figures_on(ranks):
    feed = tiny.feed_of(open_source("digits", None, "", False))
    gallery = Gallery(tiny.digits_feed(), np.arange(0, 300, 2))
    task = tasks.build({"name": "features"})
    return evaluate(
        without(3), feed, 7, ranks, Tracker(False), ids=np.arange(53), task=task, dense=Small(), gallery=gallery
    )


def test_figures_are_the_same_for_any_number_of_ranks(pool):
    alone = figures_on(tiny.machine().comm)
    assert 0.5 < alone["cka"] < 1
    assert alone["knn"] > 40
    assert alone["loss"] > 0
    for world in (2, 3):
        assert pool.run(world, figures_on) == [alone] * world


def test_the_dense_network_is_like_itself_and_without_a_gallery_there_is_no_knn():
    feed, network, task = tiny.digits_feed(), Small(), tasks.build({"name": "features"})
    figures = evaluate(
        network, feed, 7, tiny.machine().comm, Tracker(False), ids=np.arange(20), task=task, dense=network
    )
    assert figures.keys() == {"cka", "loss", "images"}
    assert abs(figures["cka"] - 1) < 1e-12
    assert figures["loss"] == 0
    assert "no classes" in task.left_out("nothing")
    assert task.left_out("classes") == ""


def test_a_tower_takes_the_checkpoint_of_the_whole_network_and_its_own(tmp_path):
    whole = models.create("resnet18", 7, 3)
    tensor_files.save_tensors(tmp_path / "whole.safetensors", whole.state_dict())
    tower, said = models.create("features:resnet18", 2, 3), []
    spec = Backbone(name="features:resnet18", checkpoint="x")
    assert load_checkpoint(tower, tmp_path / "whole.safetensors", spec, 2, False, said.append) == ""
    assert any("fc.weight" in line and "is left out" in line for line in said), said
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = tower.eval()(images)
        assert torch.equal(found["pooled"], whole.eval().forward_head(whole.forward_features(images), pre_logits=True))
    tensor_files.save_tensors(tmp_path / "own.safetensors", tower.state_dict())
    again = models.create("features:resnet18", 2, 3)
    load_checkpoint(again, tmp_path / "own.safetensors", spec, 2, False, said.append)
    assert torch.equal(again.eval()(images)["pooled"], found["pooled"])


def test_refusals():
    task = tasks.build({"name": "features", "weights": {"pooled": 1, "patch": 1}})
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(PruneError, match=r"(?s)task.weights: .*'patch'.*patches"):
        task.check_outputs(Small()(images.double()), 1, images)
    with pytest.raises(PruneError, match=r"Write finetune.distill=1"):
        task.check_training(Training(epochs=1), "finetune")
    with pytest.raises(PruneError, match=r"train.epochs=0"):
        task.check_training(Training(epochs=1, distill=1), "train")
    with pytest.raises(PruneError, match="no features before its head"):
        models.create("features:lenet5_mnist", 10, 1)
    plain = tasks.build({"name": "features"})
    assert "features are" in plain.check_outputs(torch.zeros(2), 1, images)


def test_images_without_classes(tmp_path):
    for split, count in (("train", 3), ("val/deep", 2)):
        (tmp_path / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (9, 7), (number * 20, 0, 0)).save(tmp_path / split / f"{number}.png")
    (tmp_path / "train" / "notes.txt").touch()
    train, test = (open_source("images", str(tmp_path), split, split == "train") for split in ("train", "val"))
    assert (len(train.labels), len(test.labels)) == (3, 2)
    assert "1 .txt" in train.note
    assert test.location(0).endswith("val/deep/0.png")
    with pytest.raises(PruneError, match=r"data.train_split: there is no folder .*images: ROOT/train"):
        open_source("images", str(tmp_path), "missing", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PruneError, match="holds no image file"):
        open_source("images", str(tmp_path), "empty", False)


TOWERS = [
    ("vit_small_patch14_dinov2", 28), ("vit_small_patch16_dinov3", 32), ("vit_base_patch16_siglip_224", 32),
    ("resnet50_clip", 64),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), TOWERS)
def test_foundation_towers_are_scored_without_labels_and_cut(name, side):
    tower = models.create(f"features:{name}", 1, 3, False, {"img_size": side}).eval()
    graph = trace_groups(tower, torch.randn(1, 3, side, side))
    assert graph.free
    images = [torch.randn(2, 3, side, side)]
    dense = tower(images[0])
    graph = dp.trace(tower, (3, side, side))
    scores = dp.score(tower, graph, "taylor", images, task="features")
    plan = dp.select(scores, graph, target={"macs": 0.8})
    found = dp.prune(tower, plan)(images[0])
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in dense.items()}
    assert not torch.equal(found["pooled"], dense["pooled"])
