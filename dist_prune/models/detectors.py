"""Detectors of torchvision as networks of image tensors: what is traced, losses of single images, and detections.

torchvision's detectors take lists of images. In training mode they return losses of a whole batch, in evaluation mode
detections. The classes here add a call with one tensor of images:

- ``network(images)``: the traceable part, tensors of fixed shapes: head outputs for every anchor. Of a two-stage
  network the second stage runs on fixed example boxes, because its own proposals depend on values.
- ``network(images, targets, ids)``: ``losses`` (n,), computed by torchvision's functions for each image as a batch of
  its own; and ``detections`` (n, ``DETECTIONS``, 6) where no gradients are computed and the mode is evaluation.

A call with a list is torchvision's own.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD
from torchvision.ops import boxes as box_ops

from dist_prune.errors import PruneError

DETECTIONS = 100  # detections of an image that are kept, the best first; COCO's metrics read no more
Sizes = list[tuple[int, int]]
Boxes = dict[str, Tensor]  # of one image: boxes (m, 4) in pixels x0, y0, x1, y1; labels (m,) from 1; scores (m,)


def boxes_of(targets: Tensor) -> list[Boxes]:
    """Targets as torchvision's losses take them: without crowds, classes counted from 1.

    Args:
        targets: (n, m, 6): class from 0 (-1: no box), x0, y0, x1, y1, and 1 for a crowd.
    """
    rows = [image[(image[:, 0] >= 0) & (image[:, 5] == 0)] for image in targets]
    return [{"boxes": row[:, 1:5].float(), "labels": row[:, 0].long() + 1} for row in rows]


def as_table(found: Sequence[Boxes]) -> Tensor:
    """Detections of n images as (n, ``DETECTIONS``, 6): class from 0 (-1: none), score, x0, y0, x1, y1; best first."""
    table = found[0]["boxes"].new_zeros((len(found), DETECTIONS, 6))
    table[..., 0] = -1
    for number, image in enumerate(found):
        order = image["scores"].argsort(descending=True, stable=True)[:DETECTIONS]
        columns = (image["labels"][order, None] - 1, image["scores"][order, None], image["boxes"][order])
        table[number, : len(order)] = torch.cat([column.to(table.dtype) for column in columns], 1)
    return table


class _ImageTensors(nn.Module):
    """What both kinds of detectors share.

    Attributes:
        prepared: whether images come normalised and of the size that the network computes on. Otherwise torchvision's
            transform does both, as in a call with a list.
    """

    prepared = True
    transform: nn.Module

    def prepare(self, images: Tensor, targets: list[Boxes] | None) -> tuple[Tensor, Sizes, list[Boxes] | None]:
        """Images as the backbone takes them, their sizes (without targets the first one), targets in their pixels."""
        if self.prepared:
            count = 1 if targets is None else len(images)  # a list for each image would fix the batch of a file
            return images, [(int(images.shape[-2]), int(images.shape[-1]))] * count, targets
        listed, targets = self.transform(list(images), targets)
        return listed.tensors, listed.image_sizes, targets

    def finish(self, found: list[Boxes], sizes: Sizes, images: Tensor) -> Tensor:
        """Detections in pixels of the images that were given."""
        if not self.prepared:
            original = [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)
            found = self.transform.postprocess(found, sizes, original)  # type: ignore[operator]
        return as_table(found)

    @property
    def detects(self) -> bool:
        """Whether a call with targets computes detections as well."""
        return not self.training and not torch.is_grad_enabled()


class SsdOutputs(SSD, _ImageTensors):
    """A single-stage detector: every anchor has logits of classes and four box coefficients."""

    head: Any
    why_not_exported = ""

    def forward(self, images: Any, targets: Any = None, ids: Tensor | None = None) -> Any:
        """See the module. ``logits`` (n, classes + 1, anchors), background first; ``box_regression``, ``anchors``."""
        if not isinstance(images, Tensor):
            return super().forward(images, targets)
        tensors, sizes, listed = self.prepare(images, None if targets is None else boxes_of(targets))
        features = list(self.backbone(tensors).values())
        head = self.head(features)
        anchors = self.anchor_generator(ImageList(tensors, sizes), [_at_least_float(level) for level in features])
        outputs = {
            "logits": head["cls_logits"].transpose(1, 2),
            "box_regression": head["bbox_regression"],
            "anchors": anchors[0].expand(images.shape[0], -1, -1),
        }
        if listed is None:
            return outputs
        with torch.autocast(images.device.type, enabled=False):
            head = {name: _at_least_float(tensor) for name, tensor in head.items()}
            losses = [self._loss(_row(head, i), anchors[i], listed[i]) for i in range(len(images))]
            outputs["losses"] = torch.stack(losses)
            if self.detects:
                outputs["detections"] = self.finish(self.postprocess_detections(head, anchors, sizes), sizes, images)
        return outputs

    def get_classifier(self) -> list[nn.Module]:
        """The layers whose outputs depend on the number of classes."""
        convolutions = (module for module in self.head.classification_head.modules() if isinstance(module, nn.Conv2d))
        return [module for module in convolutions if module.groups == 1]  # ssdlite has depthwise ones before them

    def _loss(self, head: Boxes, anchors: Tensor, target: Boxes) -> Tensor:
        """The loss that torchvision computes of a batch of one image: both parts, divided by its matched anchors."""
        if len(target["boxes"]):
            matched = self.proposal_matcher(box_ops.box_iou(target["boxes"], anchors))
        else:
            matched = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        return torch.stack(list(self.compute_loss([target], head, [anchors], [matched]).values())).sum()


class FasterRcnnOutputs(FasterRCNN, _ImageTensors):
    """A two-stage detector: a network proposes boxes, and a head classifies and corrects them."""

    rpn: Any
    roi_heads: Any
    why_not_exported = (
        "its second stage runs on boxes that its first stage proposes, as many as the image has, which no file of "
        "fixed operations does. Load the bundle with dist_prune.load and call it with a list of images, or take a "
        "single-stage network (torchvision:ssdlite320_mobilenet_v3_large)"
    )

    def forward(self, images: Any, targets: Any = None, ids: Tensor | None = None) -> Any:
        """See the module. ``logits`` (n, classes + 1, boxes), ``box_regression``, ``objectness``, ``rpn_regression``.

        The proposals that losses are computed from are drawn at random, as torchvision does it: in training mode by
        torch's generator, in evaluation mode from the image's id.
        """
        if not isinstance(images, Tensor):
            return super().forward(images, targets)
        tensors, sizes, listed = self.prepare(images, None if targets is None else boxes_of(targets))
        features = self.backbone(tensors)
        levels = list(features.values())
        maps, coefficients = self.rpn.head(levels)
        counts = [level[0].numel() for level in maps]
        objectness, deltas = concat_box_prediction_layers(maps, coefficients)
        objectness, deltas = objectness.view(len(images), -1), deltas.view(len(images), -1, 4)
        outputs = {"objectness": objectness, "rpn_regression": deltas}
        if listed is None:
            return {**self._second_stage(features, self._example_boxes(tensors), sizes), **outputs}
        with torch.autocast(images.device.type, enabled=False):
            objectness, deltas = _at_least_float(objectness), _at_least_float(deltas)
            grid = [_at_least_float(level) for level in levels]  # anchors have the dtype of the maps
            anchors = self.rpn.anchor_generator(ImageList(tensors, sizes), grid)
            decoded = self.rpn.box_coder.decode(deltas.detach().flatten(0, 1), anchors).view(*deltas.shape)
            proposals, _ = self.rpn.filter_proposals(decoded, objectness, sizes, counts)
            drawn, first = [], []
            for number, target in enumerate(listed):
                with self._draws(ids, number):
                    first.append(self._first_loss(objectness[number], deltas[number], anchors[number], target))
                    drawn.append(self.roi_heads.select_training_samples([proposals[number]], [target]))
        sampled = _padded([boxes[0] for boxes, *_ in drawn], self.roi_heads.fg_bg_sampler.batch_size_per_image)
        outputs |= self._second_stage(features, sampled, sizes)
        with torch.autocast(images.device.type, enabled=False):
            second = [self._second_loss(_row(outputs, i), *drawn[i][2:]) for i in range(len(images))]
        outputs["losses"] = torch.stack(first) + torch.stack(second)
        if self.detects:
            outputs["detections"] = self.finish(self._detect(features, proposals, sizes), sizes, images)
        return outputs

    def get_classifier(self) -> list[nn.Module]:
        """The layers whose outputs depend on the number of classes."""
        predictor = self.roi_heads.box_predictor
        return [predictor.cls_score, predictor.bbox_pred]

    def _second_stage(self, features: Mapping[str, Tensor], boxes: Tensor, sizes: Sizes) -> dict[str, Tensor]:
        """Run the head on (n, m, 4) boxes. Its layers see (n, m, features): the first axis is the image."""
        head, predictor = self.roi_heads.box_head, self.roi_heads.box_predictor
        pooled = self.roi_heads.box_roi_pool(features, list(boxes), sizes).view(*boxes.shape[:2], -1)
        hidden = functional.relu(head.fc7(functional.relu(head.fc6(pooled))))
        return {
            "logits": predictor.cls_score(hidden).transpose(1, 2),
            "box_regression": predictor.bbox_pred(hidden),
        }

    def _example_boxes(self, images: Tensor) -> Tensor:
        """(n, m, 4) boxes of all sizes, the same for every image; m is the largest number of proposals."""
        count = self.rpn._post_nms_top_n["testing"]
        draws = torch.rand((count, 4), generator=torch.Generator().manual_seed(0)).to(images.device, images.dtype)
        side = draws.new_tensor([images.shape[-1], images.shape[-2]])
        size = (0.02 + 0.9 * draws[:, :2].square()) * side
        corner = draws[:, 2:] * (side - size)
        return torch.cat([corner, corner + size], 1).expand(len(images), -1, -1)

    def _first_loss(self, objectness: Tensor, deltas: Tensor, anchors: Tensor, target: Boxes) -> Tensor:
        labels, matched = self.rpn.assign_targets_to_anchors([anchors], [target])
        wanted = self.rpn.box_coder.encode(matched, [anchors])
        return torch.stack(self.rpn.compute_loss(objectness, deltas, labels, list(wanted))).sum()

    def _second_loss(self, row: Boxes, labels: list[Tensor], wanted: list[Tensor]) -> Tensor:
        count = len(labels[0])
        logits = _at_least_float(row["logits"][0].T[:count])
        regression = _at_least_float(row["box_regression"][0, :count])
        return torch.stack(fastrcnn_loss(logits, regression, labels, list(wanted))).sum()

    def _detect(self, features: Mapping[str, Tensor], proposals: list[Tensor], sizes: Sizes) -> list[Boxes]:
        outputs = self._second_stage(features, _padded(proposals, self.rpn.post_nms_top_n()), sizes)
        found = []
        for number, boxes in enumerate(proposals):
            logits = _at_least_float(outputs["logits"][number].T[: len(boxes)])
            regression = _at_least_float(outputs["box_regression"][number, : len(boxes)])
            each = self.roi_heads.postprocess_detections(logits, regression, [boxes], [sizes[number]])
            found.append({name: value[0] for name, value in zip(("boxes", "scores", "labels"), each, strict=True)})
        return found

    @contextmanager
    def _draws(self, ids: Tensor | None, number: int) -> Iterator[None]:
        """Draw from the image's id in evaluation mode, so that a loss depends on nothing but the image."""
        if self.training:
            yield
            return
        device = next(self.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0 if ids is None else int(ids[number]))
            yield


_KINDS: dict[type[nn.Module], type[nn.Module]] = {SSD: SsdOutputs, FasterRCNN: FasterRcnnOutputs}


def adapt(model: nn.Module, prepared: bool = True) -> nn.Module:
    """Let a detector of torchvision take tensors of images, in place. Its layers and its state dict stay.

    Args:
        model: any network; others than torchvision's SSD and Faster R-CNN are left alone.
        prepared: see ``SsdOutputs.prepared``.

    Raises:
        PruneError: its second stage has a head that is not the one of two linear layers.
    """
    kind = _KINDS.get(type(model))
    if kind is None:
        return model
    heads: Any = getattr(model, "roi_heads", None)
    if heads is not None and (not isinstance(heads.box_head, TwoMLPHead) or heads.has_mask() or heads.has_keypoint()):
        raise PruneError(
            f"the detector's second stage is a {type(heads.box_head).__name__}; offered are Faster R-CNN with two "
            "linear layers (fasterrcnn_resnet50_fpn, fasterrcnn_mobilenet_v3_large_320_fpn) and SSD"
        )
    model.__class__ = kind
    if not prepared:
        model.prepared = False  # type: ignore[assignment]
    return model


def view(model: nn.Module) -> nn.Module:
    """A detector of torchvision that takes tensors of images, with the same layers and tensors as the user's one.

    Args:
        model: a bare network; others than torchvision's SSD and Faster R-CNN come back as they are.
    """
    return adapt(copy.copy(model), prepared=False) if type(model) in _KINDS else model


def take_image_format(model: nn.Module, image: Mapping[str, Any]) -> None:
    """Set how a list of images on [0, 1] is prepared: resized to a square and normalised, in place.

    Args:
        model: any network; others than those that ``adapt`` has changed for prepared images are left alone.
        image: ``mean``, ``std`` and ``size``.
    """
    if type(model) not in _KINDS.values() or not getattr(model, "prepared", True):
        return
    transform: Any = model.transform
    transform.image_mean, transform.image_std = list(image["mean"]), list(image["std"])
    size = int(image["size"])
    transform.min_size, transform.max_size, transform.fixed_size = (size,), size, (size, size)
    transform.size_divisible = 1  # no edge of zeros, which training did not have


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _row(outputs: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The outputs of one image, as a batch of one."""
    return {name: tensor[number : number + 1] for name, tensor in outputs.items()}


def _padded(boxes: Sequence[Tensor], count: int) -> Tensor:
    """(n, count, 4): boxes of n images, filled up with empty ones."""
    table = boxes[0].new_zeros((len(boxes), count, 4))
    for number, own in enumerate(boxes):
        table[number, : len(own)] = own
    return table
