"""Segmentation: exact figures and equal plans for any number of ranks, void, several outputs, refusals."""

import numpy as np
import pytest
import torch

from dist_prune import methods, plugins, tasks
from dist_prune.data.loader import Batch
from dist_prune.errors import PruneError
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.tasks.segmentation import VOID, Segmentation
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import masks, tiny

TASK = Segmentation()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return masks.write(tmp_path_factory.mktemp("masks"))


def figures_on(ranks, root, form):
    return evaluate(masks.network(form), masks.feed(root), 3, ranks, Tracker(False), task=TASK)


def reference(model, feed):
    """mIoU and pixel accuracy by loops over classes, in numpy."""
    (batch,) = feed.batches([np.arange(masks.IMAGES)])
    with torch.no_grad():
        found = model(batch.images)["out"].argmax(1).numpy()
    truth = batch.labels.numpy()
    counted = truth != VOID
    ratios = []
    for number in range(masks.CLASSES):
        one, other = (found == number) & counted, (truth == number) & counted
        if (one | other).any():
            ratios.append(100 * (one & other).sum() / (one | other).sum())
    return float(np.mean(ratios)), 100 * float((found == truth)[counted].mean())


def test_figures_are_exact_for_any_number_of_ranks(pool, folder):
    alone = figures_on(tiny.machine().comm, folder, "dict")
    miou, accuracy = reference(masks.network(), masks.feed(folder))
    assert alone["miou"] == pytest.approx(miou, abs=1e-12)
    assert alone["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert alone["images"] == masks.IMAGES
    for world in (2, 3):
        assert pool.run(world, figures_on, folder, "dict") == [alone] * world


def plan_on(ranks, root, name):
    model, feed = masks.network(), masks.feed(root)
    graph = trace_groups(model, torch.randn(1, 3, masks.SIDE, masks.SIDE, dtype=torch.float64))
    method = methods.build({"name": name})
    graph = method.prunable(graph)
    context = DistributedScoringContext(
        model, graph, feed, np.arange(masks.IMAGES), tiny.machine(ranks), Tracker(False), 4, task=TASK
    )
    scores = method.score(context)
    return method.select(scores, graph, SelectionRequest(target=("macs", 0.6))).fingerprint


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_the_plan_is_the_same_for_any_number_of_ranks(pool, folder, name):
    alone = plan_on(tiny.machine().comm, folder, name)
    assert pool.run(2, plan_on, folder, name) == [alone] * 2
    assert pool.run(3, plan_on, folder, name) == [alone] * 3


def batch_of(labels):
    return Batch(torch.zeros(len(labels), 3, *labels.shape[1:]), labels, torch.arange(len(labels)))


def test_void_counts_nowhere():
    """Neither the loss nor the table sees what a network says about void; an image of void alone has the loss 0."""
    labels = torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = VOID
    labels[1] = VOID
    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    losses = TASK.loss(logits, batch_of(labels))
    seen = labels[0] != VOID
    wanted = torch.nn.functional.cross_entropy(logits[0][:, seen].T, labels[0][seen])
    assert torch.allclose(losses, torch.stack([wanted, torch.tensor(0.0)]))
    losses.sum().backward()
    assert bool((logits.grad[:, :, labels[0] == VOID][0] == 0).all())
    assert bool((logits.grad[1] == 0).all())
    with torch.no_grad():
        table = TASK.tally(logits, batch_of(labels))["confusion"]
    assert int(table.sum()) == int(seen.sum())


def test_a_class_that_nobody_names_is_left_out_of_the_mean():
    confusion = torch.tensor([[6, 2, 0], [2, 6, 0], [0, 0, 0]])
    figures = TASK.figures({"confusion": confusion, "loss": torch.tensor([0, 0])}, 1)
    assert figures["miou"] == pytest.approx(60)
    assert figures["pixel_accuracy"] == pytest.approx(75)


def test_the_auxiliary_head_weighs_as_the_option_says():
    labels = torch.randint(0, 4, (2, 8, 8))
    outputs = {"out": torch.randn(2, 4, 8, 8), "aux": torch.randn(2, 4, 2, 2)}
    batch = batch_of(labels)
    alone, aux = TASK.loss(outputs["out"], batch), TASK.loss(outputs["aux"], batch)
    weighed = tasks.build({"name": "segmentation", "aux_weight": 0.25})
    assert torch.allclose(weighed.loss(outputs, batch), alone + 0.25 * aux)
    counted = [weighed.tally(out, batch)["loss"] for out in (outputs, outputs["out"])]
    assert torch.equal(*counted)  # it is measured without


def test_a_head_that_the_loss_does_not_read_has_gradients_of_zero(folder):
    graph = trace_groups(masks.network(), torch.randn(1, 3, masks.SIDE, masks.SIDE, dtype=torch.float64))
    context = DistributedScoringContext(
        masks.network(), graph, masks.feed(folder), np.arange(6), tiny.machine(), Tracker(False), 4,
        task=tasks.build({"name": "segmentation", "aux_weight": 0}),
    )  # fmt: skip
    scores = methods.build({"name": "taylor"}).score(context)
    assert bool((scores["aux:in:gate"] == 0).all())
    assert bool((scores["head:in:gate"] != 0).any())


def test_predictions_have_pictures(folder):
    (batch,) = masks.feed(folder).batches([np.array([0, 5])])
    images = np.zeros((2, masks.SIDE, masks.SIDE, 3), np.uint8)
    with torch.no_grad():
        outputs = {name: masks.network(seed=seed)(batch.images) for seed, name in enumerate(("dense", "pruned"))}
    rows = TASK.pictures(batch, images, outputs)
    assert [[picture.caption for picture in row] for row in rows] == [["image", "mask", "dense", "pruned"]] * 2
    assert all(picture.pixels.shape == (masks.SIDE, masks.SIDE, 3) for row in rows for picture in row)
    assert not np.array_equal(rows[0][2].pixels, rows[0][3].pixels)
    legend = TASK.legend(("road", "sky", "tree", "car"))
    assert [name for name, _ in legend] == ["road", "sky", "tree", "car"]
    assert len({colour for _, colour in legend}) == 4


def test_a_class_that_the_network_does_not_have_is_named():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 1, 2] = 7
    with pytest.raises(PruneError, match=r"a mask has the class 7, and the network gives 3 classes, 0 to 2"):
        TASK.loss(torch.zeros(1, 3, 4, 4), batch_of(labels))


def test_a_method_that_needs_classes_of_images_is_refused_with_the_reason():
    refused = {name for name in methods.list_names() if methods.find(name).task_needs}
    assert refused == {"hrel", "mint", "entropy", "shapley", "dirichlet", "sensitivity"}
    for name in refused:
        with pytest.raises(
            PruneError, match=rf"method.name: {name} needs (one class|logits of).*segmentation has none"
        ):
            TASK.check_method(name, methods.find(name).task_needs)
        tasks.build({"name": "classification"}).check_method(name, methods.find(name).task_needs)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"name": "segmentatio"}, r"unknown task .*segmentation"),
        ({"name": "segmentation", "aux_wight": 1}, r"task.aux_wight: unknown key.*aux_weight"),
        ({"name": "segmentation", "aux_weight": -1}, r"task.aux_weight: .*greater than or equal to 0"),
        (
            {"name": "classification", "aux_weight": 1},
            r"task.aux_weight: unknown key. The task classification takes no",
        ),
    ],
)
def test_a_wrong_task_section_is_refused(section, text):
    with pytest.raises(PruneError, match=text):
        tasks.build(section)


def test_outputs_of_another_form_are_refused():
    images = torch.zeros(2, 3, 8, 8)
    assert TASK.check_outputs({"out": torch.zeros(2, 4, 8, 8)}, 4, images) == ""
    assert "tensor (2, 4)" in TASK.check_outputs(torch.zeros(2, 4), 4, images)
    assert "(images, 4, h, w)" in TASK.check_outputs({"out": torch.zeros(2, 5, 8, 8)}, 4, images)


def test_a_task_of_another_package_is_found(monkeypatch):
    point = plugins.Plugin("task", "mine", "tests.tasks.test_segmentation:Mine", "theirs", "1.0")
    monkeypatch.setattr(plugins, "installed", lambda kind: (point,) if kind == "task" else ())
    assert "mine" in tasks.list_names()
    assert isinstance(tasks.build({"name": "mine", "aux_weight": 2}), Mine)
    wrong = plugins.Plugin("task", "wrong", "tests.support.masks:Segmenter", "theirs", "1.0")
    monkeypatch.setattr(plugins, "installed", lambda kind: (wrong,) if kind == "task" else ())
    with pytest.raises(PruneError, match=r"task 'wrong' of theirs .* is no subclass of dist_prune.tasks.base.Task"):
        tasks.find("wrong")


class Mine(Segmentation):
    name = "mine"
