"""Detection: figures by pycocotools, equal figures and plans for any number of ranks, refusals, pictures."""

import numpy as np
import pytest
import torch

import dist_prune as dp
from dist_prune import methods, tasks
from dist_prune.config.training import Training
from dist_prune.data.loader import Batch
from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.consumers import GateGradient
from dist_prune.pruning.hooks.statistics import Accumulator
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.scoring.statistic_collection import collect_batch
from dist_prune.tasks import detection
from dist_prune.tasks.detection import Detection, coco_precision
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import boxes, tiny

TASK = Detection()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield boxes.write(tmp_path_factory.mktemp("boxes"))
    patch.undo()


def truth(*images):
    table = np.zeros((len(images), max(map(len, images)), 6))
    table[..., 0] = -1
    for number, rows in enumerate(images):
        table[number, : len(rows)] = rows or np.zeros((0, 6))
    return table


CAR, BUS = [0, 10, 10, 30, 30, 0], [1, 40, 10, 60, 50, 0]


def found(*rows):
    """(class, score, x0, y0, x1, y1) of the only image."""
    table = np.zeros((1, 5, 6))
    table[..., 0] = -1
    table[0, : len(rows)] = rows or np.zeros((0, 6))
    return table


@pytest.mark.parametrize(
    ("rows", "mean", "half"),
    [
        ([[0, 0.9, 10, 10, 30, 30], [1, 0.8, 40, 10, 60, 50]], 100, 100),
        ([[0, 0.9, 10, 10, 30, 30]], 50, 50),  # the other class has a box and no detection
        ([[1, 0.9, 10, 10, 30, 30], [0, 0.8, 40, 10, 60, 50]], 0, 0),  # classes swapped
        ([[0, 0.9, 10, 10, 30, 23], [1, 0.8, 40, 10, 60, 50]], (30 + 100) / 2 + 5, 100),  # IoU 0.65: four of ten
        ([[0, 0.5, 10, 10, 30, 30], [0, 0.9, 50, 50, 60, 60], [1, 0.8, 40, 10, 60, 50]], 75, 75),  # a false one before
        ([], 0, 0),
    ],
)
def test_precision_by_hand(rows, mean, half):
    precision = coco_precision(truth([CAR, BUS]), found(*rows))
    assert precision == (pytest.approx(mean, abs=0.6), pytest.approx(half, abs=0.6))


def test_a_crowd_is_neither_a_miss_nor_a_false_detection():
    crowd = [0, 40, 40, 60, 60, 1]
    for rows in ([[0, 0.5, 10, 10, 30, 30]], [[0, 0.5, 10, 10, 30, 30], [0, 0.9, 42, 42, 58, 58]]):
        assert coco_precision(truth([CAR, crowd]), found(*rows)) == pytest.approx((100, 100))


def test_images_without_boxes_count_their_false_detections():
    table = np.concatenate([found([0, 0.5, 10, 10, 30, 30]), found([0, 0.9, 0, 0, 9, 9])])
    assert coco_precision(truth([CAR], []), table)[1] == pytest.approx(50, abs=0.6)
    assert np.isnan(coco_precision(truth([], [[-1, 0, 0, 0, 0, 0]]), table)).all()


def figures_on(ranks, root, name):
    return evaluate(boxes.network(name), boxes.feed(root), 2, ranks, Tracker(False), task=TASK)


@pytest.mark.parametrize("name", [boxes.SSD, pytest.param(boxes.RCNN, marks=pytest.mark.slow)])
def test_figures_are_the_same_for_any_number_of_ranks(pool, folder, name):
    alone = figures_on(tiny.machine().comm, folder, name)
    assert alone["images"] == boxes.IMAGES
    assert {"map", "ap50", "loss"} <= alone.keys()
    for world in (2, 3):
        assert pool.run(world, figures_on, folder, name) == [alone] * world


def test_figures_are_those_of_the_gathered_detections(folder):
    loader = boxes.feed(folder)
    (batch,) = loader.batches([np.arange(boxes.IMAGES)])
    model = boxes.network()
    with torch.no_grad():
        outputs = model(batch.images, batch.labels, batch.ids)
    rows = batch.labels.double().numpy()
    perfect = np.zeros((boxes.IMAGES, 4, 6))
    perfect[..., 0] = -1
    perfect[:, :3] = np.concatenate([rows[..., :1], np.full_like(rows[..., :1], 0.5), rows[..., 1:5]], -1)
    assert coco_precision(rows, perfect) == pytest.approx((100, 100))
    wanted = coco_precision(rows, outputs["detections"].double().numpy())
    figures = evaluate(model, loader, boxes.IMAGES, tiny.machine().comm, Tracker(False), task=TASK)
    assert (figures["map"], figures["ap50"]) == pytest.approx(wanted)
    assert figures["loss"] == pytest.approx(float(outputs["losses"].mean()), rel=1e-4)


def plan_on(ranks, root, network, name):
    model, feed = boxes.network(network), boxes.feed(root)
    graph = trace_groups(model, torch.randn(1, 3, boxes.SIDE, boxes.SIDE))
    method = methods.build({"name": name})
    graph = method.prunable(graph.protect_producers(TASK.protect(graph.producers)))
    context = DistributedScoringContext(
        model, graph, feed, np.arange(boxes.IMAGES), tiny.machine(ranks), Tracker(False), 3, task=TASK
    )
    plan = method.select(method.score(context), graph, SelectionRequest(target=("macs", 0.5)))
    assert not {"head", "rpn.head.cls_logits"} & {name.partition(".")[0] for name, gone in plan.removed.items() if gone}
    return plan.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "name"),
    [
        (boxes.SSD, "taylor"),
        (boxes.RCNN, "taylor"),
        (boxes.RCNN, "group_norm"),
        (boxes.SSD, "l1"),
        (boxes.SSD, "random"),
    ],
)
def test_the_plan_is_the_same_for_any_number_of_ranks(pool, folder, network, name):
    alone = plan_on(tiny.machine().comm, folder, network, name)
    for world in (2, 3) if name == "taylor" else (2,):
        assert pool.run(world, plan_on, folder, network, name) == [alone] * world


def test_a_head_on_several_levels_adds_up_its_gradients(folder):
    """The gradient of a gate on the RPN's convolution is that of the whole loss, over all levels of maps."""
    model = boxes.network(boxes.RCNN)
    (batch,) = boxes.feed(folder).batches([np.arange(1, 4)])
    point = HookPoint("rpn.head.cls_logits:in", "rpn.head.conv.0.0", 256, "conv", False, "in")
    accumulator = Accumulator(GateGradient(batches=False), [point], 3, torch.device("cpu"))
    collect_batch(model, [point], accumulator, batch, torch.arange(3), TASK)
    gate = torch.ones(3, 256, 1, 1, requires_grad=True)
    handle = model.rpn.head.cls_logits.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    losses = TASK.loss(TASK.forward(model, batch), batch)
    handle.remove()
    (wanted,) = torch.autograd.grad(losses.sum(), gate)
    assert torch.allclose(accumulator.tables[point.name]["gate"].float(), wanted[..., 0, 0], atol=1e-7)
    assert float(wanted.abs().max()) > 1e-5


@pytest.mark.parametrize("name", ["hrel", "mint", "entropy", "dirichlet", "sensitivity", "shapley"])
def test_methods_of_classes_are_refused(name):
    with pytest.raises(PruneError, match=f"method.name: {name} needs .*; the task detection has none"):
        TASK.check_method(name, methods.find(name).task_needs)


@pytest.mark.parametrize("name", ["taylor", "l1", "random", "group_norm", "fisher", "hrank"])
def test_other_methods_are_not(name):
    TASK.check_method(name, methods.find(name).task_needs)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mixup": 0.2}, "train.mixup: the task detection cannot mix or smooth"),
        ({"distill": 0.5}, "train.distill: the task detection has no distillation loss; set it to 0"),
    ],
)
def test_trainings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(PruneError, match=text):
        TASK.check_training(Training(epochs=1, **settings), "train")


def test_without_pycocotools_nothing_starts(monkeypatch):
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
    with pytest.raises(PruneError, match=r"by pycocotools, which is missing; pip install 'dist-prune\[detection"):
        tasks.build({"name": "detection"})


def test_pictures_show_boxes_in_their_classes_colours():
    image = np.full((1, 20, 20, 3), 9, dtype=np.uint8)
    labels = torch.tensor([[[1.0, 2, 3, 12, 14, 0], [-1, 0, 0, 0, 0, 0]]])
    table = torch.zeros(1, 100, 6)
    table[..., 0] = -1
    table[0, :2] = torch.tensor([[0, 0.9, 5, 5, 30, 10], [0, 0.1, 0, 0, 9, 9]])
    batch = Batch(torch.zeros(1, 3, 20, 20), labels, torch.arange(1))
    ((boxes_picture, dense),) = TASK.pictures(batch, image, {"dense": {"detections": table}})
    assert [boxes_picture.caption, dense.caption] == ["boxes", "dense"]
    colours = [tuple(int(text[at : at + 2], 16) for at in (1, 3, 5)) for _, text in TASK.legend(["car", "bus"])]
    edge = {(3, x) for x in range(2, 12)} | {(13, x) for x in range(2, 12)}
    edge |= {(y, x) for y in range(3, 14) for x in (2, 11)}
    painted = {tuple(map(int, at)) for at in np.argwhere((boxes_picture.pixels != 9).any(-1))}
    assert painted == edge
    assert {tuple(map(int, boxes_picture.pixels[at])) for at in edge} == {colours[1]}
    assert tuple(map(int, dense.pixels[5, 19])) == colours[0]  # cut at the edge
    assert (dense.pixels[0] == 9).all()  # below min_score


@pytest.mark.slow
def test_the_library_prunes_a_user_s_own_detector(tmp_path):
    def make():
        return boxes.plain()

    model, images = make(), [torch.rand(3, 50, 70) for _ in range(4)]
    targets = [{"boxes": torch.tensor([[5.0, 6, 30, 40]]), "labels": torch.tensor([1 + n % 2])} for n in range(3)]
    targets.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})
    graph = dp.trace(model, (3, 50, 70))
    assert "its channels are the classes and boxes of each anchor" in str(graph)
    scores = dp.score(model, graph, "taylor", [(images, targets)], task="detection", micro_batch=2)
    plan = dp.select(scores, graph, target={"macs": 0.5})
    small = dp.prune(model, plan)
    assert type(small) is type(make())
    assert set(small(images)[0]) == {"boxes", "scores", "labels"}
    assert set(small.train()(images, targets)) == {"bbox_regression", "classification"}
    dp.save(small.eval(), plan, tmp_path / "bundle", task="detection", classes=["car", "bus"])
    again = dp.load(tmp_path / "bundle", model=make)
    assert torch.equal(again(images)[0]["scores"], small(images)[0]["scores"])
