"""Multi-label and regression: figures against scikit-learn, exact for any number of ranks; their arrays."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score
from torch import nn

from dist_prune import tasks
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import Batch
from dist_prune.errors import PruneError
from dist_prune.tasks.multilabel import average_precision
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import tiny


def write(path, kind):
    """The real digits with targets of another kind: which of three strokes they have, or how bright they are."""
    arrays = {}
    for split, train in (("train", True), ("test", False)):
        source = open_source("digits", None, "", train)
        images, labels = source.images[:53], source.labels[:53]
        arrays[f"x_{split}"] = images
        ink = images.reshape(len(images), -1).mean(1) / 100
        arrays[f"y_{split}"] = (
            np.stack([labels % 2, labels < 5, labels > 7], 1).astype(np.uint8)
            if kind == "labels"
            else np.stack([ink, labels / 10], 1)
        )
    np.savez(path, **arrays)
    return path


class Small(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(1, 4, 3, 2), nn.Linear(36, outputs)
        self.double().eval()

    def forward(self, x):
        return self.head(self.body(x).relu().flatten(1))


def figures_on(ranks, path, name, outputs):
    kind = {"multilabel": "npz_labels", "regression": "npz_values"}[name]
    feed = tiny.feed_of(open_source(kind, str(path), "", False))
    return evaluate(Small(outputs), feed, 7, ranks, Tracker(False), task=tasks.build({"name": name}))


@pytest.mark.parametrize(("name", "kind", "outputs"), [("multilabel", "labels", 3), ("regression", "values", 2)])
def test_figures_are_those_of_scikit_learn_for_any_number_of_ranks(pool, tmp_path, name, kind, outputs):
    path = write(tmp_path / "digits.npz", kind)
    alone = figures_on(tiny.machine().comm, path, name, outputs)
    feed = tiny.feed_of(open_source(f"npz_{kind}", str(path), "", False))
    (batch,) = feed.batches([np.arange(53)])
    with torch.no_grad():
        found, wanted = Small(outputs)(batch.images).numpy(), batch.labels.numpy()
    if name == "multilabel":
        assert alone["map"] == pytest.approx(100 * average_precision_score(wanted, found, average="macro"), abs=1e-9)
    else:
        assert alone["rmse"] == pytest.approx(np.sqrt(np.mean((found - wanted) ** 2)), rel=1e-9)
        assert alone["mae"] == pytest.approx(mean_absolute_error(wanted, found), rel=1e-9)
        assert alone["r2"] == pytest.approx(r2_score(wanted, found), rel=1e-9)
    assert pool.run(2, figures_on, path, name, outputs) == [alone] * 2
    assert pool.run(3, figures_on, path, name, outputs) == [alone] * 3


def test_equal_scores_share_a_threshold():
    scores = torch.tensor([0.5, 0.5, 0.5, 0.1], dtype=torch.float64)
    for labels in ([1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 0]):
        wanted = average_precision_score(np.array(labels), scores.numpy())
        assert average_precision(scores, torch.tensor(labels)) == pytest.approx(wanted)


def test_a_smaller_error_is_better():
    task = tasks.build({"name": "regression"})
    assert task.better(0.1, 0.2)
    assert not task.better(0.2, 0.1)
    assert task.better(5.0, None)
    assert not task.better(float("nan"), None)
    assert tasks.build({"name": "multilabel"}).better(0.2, 0.1)


def test_a_loss_belongs_to_its_image():
    """The loss of an image is the same alone and in a batch: micro-batches may be cut anywhere."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    labels = {"multilabel": torch.randint(0, 2, (5, 3)), "regression": torch.randn(5, 3, dtype=torch.float64)}
    for name, targets in labels.items():
        task = tasks.build({"name": name})
        images = torch.zeros(5, 1, 2, 2)
        whole = task.loss(outputs, Batch(images, targets, torch.arange(5)))
        for i in range(5):
            one = Batch(images[i : i + 1], targets[i : i + 1], torch.tensor([i]))
            assert torch.equal(task.loss(outputs[i : i + 1], one)[0], whole[i])


@pytest.mark.parametrize(
    ("kind", "targets", "text"),
    [
        ("npz_labels", np.arange(6) % 3, r"y_train .* is int64 \(6,\) for 6 images"),
        ("npz_labels", np.full((6, 2), 3), r"has the value 3, which is neither 0 nor 1"),
        ("npz_values", np.full((6, 2), np.nan), r"has values that are not finite"),
        ("npz_values", np.array(list("abcdef")), r"y_train .* is <U1"),
        ("npz_values", np.zeros((5, 2)), r"\(5, 2\) for 6 images"),
    ],
)
def test_targets_of_another_form_are_refused(tmp_path, kind, targets, text):
    images = np.zeros((6, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=targets, x_test=images, y_test=targets)
    with pytest.raises(PruneError, match=text):
        open_source(kind, str(tmp_path / "a.npz"), "", True)
