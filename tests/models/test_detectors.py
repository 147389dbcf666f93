"""Detectors of torchvision as networks of tensors: its own losses and detections, the traced part, checkpoints."""

import pytest
import torch
import torchvision

from dist_prune import models
from dist_prune.config.data import Backbone
from dist_prune.errors import PruneError
from dist_prune.models import detectors
from dist_prune.models.load_checkpoint import classifier_names, load_checkpoint
from dist_prune.pruning.graph.layer_trace import trace_layers
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import COSTS, macs
from dist_prune.pruning.surgery.surgeon import apply_plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.tasks.detection import Detection
from tests.support import boxes

BOTH = pytest.mark.parametrize("name", [boxes.SSD, boxes.RCNN])
SLOW = pytest.mark.parametrize("name", [boxes.SSD, pytest.param(boxes.RCNN, marks=pytest.mark.slow)])


def images(count=3, side=boxes.SIDE):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4))


def table(count=3):
    rows = [[[0, 4, 6, 30, 40, 0], [1, 20, 10, 60, 50, 0]], [[-1, 0, 0, 0, 0, 0]] * 2, [[1, 8, 8, 24, 30, 0]] * 2]
    targets = torch.tensor(rows[:count], dtype=torch.float32)
    targets[2:, 1, 5] = 1  # a crowd, which is not learned
    return targets


def as_torchvision(name, model):
    """The detector as torchvision makes it, with the same weights; it neither resizes nor normalises."""
    plain = boxes.plain(name)
    plain.load_state_dict(model.state_dict())
    plain.transform.image_mean, plain.transform.image_std = [0.0] * 3, [1.0] * 3
    side = boxes.SIDE
    plain.transform.min_size, plain.transform.max_size, plain.transform.fixed_size = (side,), side, (side, side)
    plain.transform.size_divisible = 1
    return plain


def losses_of_torchvision(name, model, image, target, seed):
    """The losses of a batch of one image by torchvision's own call, with batch norms in evaluation mode."""
    plain = as_torchvision(name, model).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout):
            module.eval()
    if name == boxes.RCNN:  # the proposals of evaluation mode
        plain.rpn.pre_nms_top_n = lambda: plain.rpn._pre_nms_top_n["testing"]
        plain.rpn.post_nms_top_n = lambda: plain.rpn._post_nms_top_n["testing"]
    plain.transform.eval()  # in training mode it draws a size
    torch.manual_seed(seed)  # Faster R-CNN draws samples
    with torch.no_grad():
        return sum(plain([image], [target]).values())


@BOTH
def test_losses_are_those_of_torchvision_for_each_image_alone(name):
    model, targets, ids = boxes.network(name), table(), torch.tensor([5, 2, 9])
    with torch.no_grad():
        found = model(images(), targets, ids)["losses"]
    for number, target in enumerate(detectors.boxes_of(targets)):
        wanted = losses_of_torchvision(name, model, images()[number], target, int(ids[number]))
        assert float(found[number]) == pytest.approx(float(wanted), rel=1e-5), number
    with torch.no_grad():
        alone = model(images()[2:], targets[2:], ids[2:])["losses"]
    assert torch.allclose(alone, found[2:], rtol=1e-5)


@BOTH
def test_detections_are_those_of_torchvision(name):
    model = boxes.network(name)
    with torch.no_grad():
        found = model(images(), table(), torch.arange(3))["detections"]
        wanted = as_torchvision(name, model)(list(images()))
    assert found.shape == (3, detectors.DETECTIONS, 6)
    for rows, image in zip(found, wanted, strict=True):
        count = min(detectors.DETECTIONS, len(image["scores"]))
        assert count > 0
        assert torch.allclose(rows[:count, 1], image["scores"][:count], atol=1e-6)
        assert (rows[:count, 1].diff() <= 0).all()
        assert (rows[count:, 0] == -1).all()
        assert set(rows[:count, 0].tolist()) <= {0.0, 1.0}


@SLOW
def test_a_list_of_images_is_torchvision_s_own_call(name):
    model, plain = boxes.network(name), boxes.plain(name)
    listed = [torch.rand(3, 50, 70), torch.rand(3, 60, 40)]
    with torch.no_grad():
        for own, other in zip(model(listed), plain(listed), strict=True):
            assert all(torch.equal(own[key], other[key]) for key in ("boxes", "scores", "labels"))
    models.take_image_format(model, {"mean": [0.1] * 3, "std": [0.2] * 3, "size": 48})
    with torch.no_grad():
        prepared = (torch.nn.functional.interpolate(listed[0][None], (48, 48), mode="bilinear") - 0.1) / 0.2
        found = model(prepared, torch.zeros(1, 0, 6), torch.arange(1))["detections"][0]
        scores = model(listed)[0]["scores"][: detectors.DETECTIONS]
    assert torch.allclose(found[: len(scores), 1], scores, atol=1e-5)


@BOTH
def test_losses_have_gradients_and_none_depend_on_other_images(name):
    model, batch = boxes.network(name), images().requires_grad_()
    losses = model(batch, table(), torch.arange(3))["losses"]
    (gradient,) = torch.autograd.grad(losses[0], batch)
    assert bool((gradient[0] != 0).any())
    assert bool((gradient[1:] == 0).all())
    trained = boxes.network(name).train()
    trained(images(), table(), torch.arange(3))["losses"].sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


@BOTH
def test_half_precision_rounds_the_maps_and_not_the_anchors(name):
    model = boxes.network(name)
    with torch.no_grad():
        whole = model(images(), table(), torch.arange(3))["losses"]
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images(), table(), torch.arange(3))
    assert half["losses"].dtype == torch.float32
    assert torch.allclose(half["losses"], whole, rtol=0.05, atol=0.02)
    if name == boxes.SSD:
        assert torch.equal(half["anchors"], model(images())["anchors"])


@pytest.fixture(scope="module", params=[boxes.SSD, boxes.RCNN])
def traced(request):
    model = boxes.network(request.param)
    return request.param, model, trace_groups(model, images(1))


def test_backbone_neck_and_heads_are_free_and_anchors_protected(traced):
    name, _, graph = traced
    graph = graph.protect_producers(Detection().protect(graph.producers))
    why = {producer: group.protected for group in graph.groups for producer in group.producers}
    kept = {producer for producer, reason in why.items() if reason}
    assert not any(producer.startswith("backbone.") for producer in kept)
    if name == boxes.SSD:
        assert len(kept) == 12
        assert all(producer.startswith("head.") for producer in kept)
        assert "head.classification_head.module_list.0.0.0" in graph.group("backbone.features.0.13.0").layers
    else:
        assert kept == {
            "rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score",
            "roi_heads.box_predictor.bbox_pred",
        }  # fmt: skip
        neck = graph.group("backbone.fpn.layer_blocks.0.0")
        assert {"rpn.head.conv.0.0", "roi_heads.box_head.fc6", "backbone.fpn.layer_blocks.1.0"} <= set(neck.layers)
        assert neck.per_channel["roi_heads.box_head.fc6", "in"] == 49  # 7x7 positions of pooled maps
        assert not why["roi_heads.box_head.fc6"]
        assert not why["rpn.head.conv.0.0"]
    reasons = {reason for reason in why.values() if reason}
    assert all(reason.startswith("its channels are the classes and boxes of each") for reason in reasons)


def test_the_cut_network_costs_what_was_counted_and_is_a_detector(traced):
    name, _, graph = traced
    half = {group.name: tuple(range(0, group.width, 2)) for group in graph.free}
    plan = Plan(half, {group.name: group.width for group in graph.groups})
    small = boxes.network(name)
    apply_plan(small, graph, plan)
    counted = {layer: (one.width_in, one.width_out) for layer, one in trace_layers(small, images(1)).items()}
    assert counted == graph.widths(plan.counts)
    again = sum(
        layer.width_out * (layer.width_in // layer.groups) * layer.kernel * layer.positions
        for layer in trace_layers(small, images(1)).values()
        if layer.kind in ("conv", "linear")
    )
    assert again == macs(graph, plan.counts) < 0.5 * macs(graph)
    assert sum(p.numel() for p in small.parameters()) == COSTS["params"].of(graph, plan.counts)
    with torch.no_grad():
        assert small(images(), table(), torch.arange(3))["losses"].isfinite().all()
        assert len(small([torch.rand(3, 50, 70)])) == 1
    if name == boxes.RCNN:  # every box of the second stage is counted
        assert graph.layers["roi_heads.box_head.fc6"].positions == 6


@SLOW
def test_a_checkpoint_of_other_classes_gets_a_new_head(name, tmp_path):
    file = tmp_path / "coco.pth"
    torch.save(boxes.plain(name, seed=1, num_classes=91).state_dict(), file)
    model = boxes.network(name)
    heads = classifier_names(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    why = load_checkpoint(model, file, Backbone(name="any"), 2, True, lambda text: None)
    assert "outputs in place of" in why or "has 91 classes" in why
    saved = torch.load(file, weights_only=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] if key in heads else saved[key]), key
    with pytest.raises(PruneError, match="class count mismatch"):
        load_checkpoint(model, file, Backbone(name="any"), 2, False, lambda text: None)
    torch.save(boxes.plain(name, seed=2).state_dict(), file)
    assert load_checkpoint(model, file, Backbone(name="any"), 2, False, lambda text: None) == ""


@pytest.mark.slow
def test_other_networks_are_left_alone_and_other_heads_refused():
    linear = torch.nn.Linear(2, 2)
    assert detectors.adapt(linear) is linear
    assert detectors.view(linear) is linear
    other = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    assert detectors.adapt(other) is other  # a class of its own
    convolutions = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    with pytest.raises(PruneError, match="second stage is a FastRCNNConvFCHead"):
        detectors.adapt(convolutions)


def test_a_detector_by_name_has_a_background_and_its_normalisation():
    model = models.create(f"torchvision:{boxes.SSD}", 2, 3, kwargs={"width_mult": 0.25})
    config = models.image_config(model, 3)
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert config["crop_mode"] == "squash"
    outputs = model.eval()(images(2))
    assert Detection().check_outputs(outputs, 2, images(2)) == ""
    assert Detection().count_outputs(outputs) == 2
    assert "detection needs a detector" in Detection().check_outputs(torch.zeros(2, 2), 2, images(2))
    assert f"torchvision:{boxes.SSD}" in models.list_names("torchvision:ssdlite*")
    with pytest.raises(PruneError, match="takes images of 3 channels, the data has 1"):
        models.create(f"torchvision:{boxes.SSD}", 2, 1)
    with pytest.raises(PruneError, match="weights of torchvision's detectors are not fetched"):
        models.create(f"torchvision:{boxes.SSD}", 2, 3, pretrained=True)
