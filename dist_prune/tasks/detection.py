"""Detection: boxes with classes; torchvision's losses of each image, mAP and AP50 by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.tasks.base import Batch, Picture, Task, TaskOptions
from dist_prune.tasks.colours import class_colours
from dist_prune.tasks.outputs import shape_text
from dist_prune.tasks.tallies import count_losses, mean_of_counted

DETECTIONS = 100  # of an image, the best first; COCO's metrics read no more
ANCHORS = "its channels are the classes and boxes of each anchor"
HEADS = {  # globs of the layers whose channels mean something for each anchor -> why they stay
    "head.classification_head.module_list.*": ANCHORS,
    "head.regression_head.module_list.*": ANCHORS,
    "rpn.head.cls_logits": ANCHORS,
    "rpn.head.bbox_pred": ANCHORS,
    "roi_heads.box_predictor.*": "its channels are the classes and boxes of each proposal",
}


class Options(TaskOptions):
    """Options of detection.

    Attributes:
        min_score: lowest score of a detection in the report's pictures.
    """

    min_score: float = Field(
        default=0.3, ge=0, le=1, description="lowest score of a detection in the report's pictures"
    )


class Detection(Task):
    """A detector finds boxes and their classes.

    The network is called with the targets: ``network(images, targets, ids)`` gives ``losses`` (n,), and in evaluation
    mode without gradients ``detections`` (n, 100, 6): class from 0 (-1: none), score, x0, y0, x1, y1 in pixels of the
    images, the best first. ``network(images)`` gives tensors of fixed shapes, the part that is traced.
    """

    name = "detection"
    Options = Options
    targets = "boxes"
    titles = {"map": "mAP@[.5:.95] %", "ap50": "AP50 %"}
    primary = "map"
    gathers_targets = True

    def __init__(self, options: Any = None):
        super().__init__(options)
        if find_spec("pycocotools") is None:
            raise PruneError(
                "task.name: detection is measured by pycocotools, which is missing; pip install "
                "'dist-prune[detection]' brings it"
            )

    def forward(self, network: Callable[..., Any], batch: Batch) -> Any:
        """Run the network with the targets: a detector's losses depend on its own intermediate results."""
        return network(batch.images, batch.labels, batch.ids)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The sum of the detector's losses, (n,): for each image what torchvision computes for a batch of it alone."""
        return outputs["losses"]

    def tally(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"loss": count_losses(outputs["losses"])}

    def tally_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"loss": (2,)}

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The detections of each image."""
        return {"detections": outputs["detections"]}

    def row_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"detections": (DETECTIONS, 6)}

    def figures(self, tables: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """``map``: average precision, mean over IoU .5 to .95 and the classes that have a box; ``ap50``: at IoU .5."""
        precision, at_half = coco_precision(tables["targets"].numpy(), tables["detections"].numpy())
        return {"map": precision, "ap50": at_half, "loss": mean_of_counted(tables["loss"], images)}

    def protect(self, layers: Sequence[str]) -> dict[str, str]:
        """The last layers of the heads."""
        return anchor_layers(layers)

    def check_outputs(self, outputs: Any, count: int, images: Tensor) -> str:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        shape = tuple(logits.shape) if isinstance(logits, Tensor) and "box_regression" in outputs else ()
        if len(shape) == 3 and shape[:2] == (len(images), count + 1):
            return ""
        return (
            f"gives {shape_text(outputs)}, for two images; detection needs a detector: "
            "torchvision:ssdlite320_mobilenet_v3_large, torchvision:fasterrcnn_mobilenet_v3_large_320_fpn, or SSD or "
            f"Faster R-CNN of torchvision for {count + 1} classes, background included"
        )

    def count_outputs(self, outputs: Any) -> int:
        """Classes without the background."""
        return outputs["logits"].shape[1] - 1

    def pictures(self, batch: Batch, images: np.ndarray, outputs: Mapping[str, Any]) -> list[list[Picture]]:
        """For each image: its boxes, and the boxes that each network finds with at least ``min_score``."""
        rows = []
        for number, image in enumerate(images):
            truth = [row for row in batch.labels[number].tolist() if row[0] >= 0]
            row = [Picture("boxes", draw(image, [(int(kind), *box[:4]) for kind, *box in truth]))]
            for name, out in outputs.items():
                table = out["detections"][number].tolist()
                found = [
                    (int(kind), *box) for kind, score, *box in table if kind >= 0 and score >= self.options.min_score
                ]
                row.append(Picture(name, draw(image, found)))
            rows.append(row)
        return rows

    def legend(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """The colour of each class."""
        colours = ("#{:02x}{:02x}{:02x}".format(*row) for row in class_colours(len(classes)).tolist())
        return list(zip(classes, colours, strict=True))


def anchor_layers(layers: Sequence[str]) -> dict[str, str]:
    """The layers of torchvision's detectors whose channels belong to anchors or proposals -> why they stay.

    Args:
        layers: module paths.
    """
    return {layer: why for layer in layers for glob, why in HEADS.items() if fnmatchcase(layer, glob)}


def draw(image: np.ndarray, boxes: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Draw the edges of boxes into a copy of an image.

    Args:
        image: (H, W, 3) uint8.
        boxes: (class from 0, x0, y0, x1, y1) in pixels.

    Returns:
        (H, W, 3) uint8; edges are one pixel wide, in the colours of ``class_colours``.
    """
    out = image.copy()
    colours = class_colours(1 + max((int(box[0]) for box in boxes), default=0))
    height, width = image.shape[:2]
    for kind, *corners in boxes:
        x0, y0, x1, y1 = (round(value) for value in corners)
        x0, x1 = (min(max(value, 0), width - 1) for value in (x0, x1 - 1))
        y0, y1 = (min(max(value, 0), height - 1) for value in (y0, y1 - 1))
        for rows, columns in ((y0, slice(x0, x1 + 1)), (y1, slice(x0, x1 + 1))):
            out[rows, columns] = colours[int(kind)]
        for columns in (x0, x1):
            out[y0 : y1 + 1, columns] = colours[int(kind)]
    return out


def coco_precision(targets: np.ndarray, detections: np.ndarray) -> tuple[float, float]:
    """Average precision by COCO's rules, as pycocotools computes it.

    Args:
        targets: (n, m, 6): class from 0 (-1: no box), x0, y0, x1, y1, 1 for a crowd.
        detections: (n, k, 6): class from 0 (-1: none), score, x0, y0, x1, y1.

    Returns:
        mAP over IoU .5 to .95, and AP at IoU .5, in percent, of up to 100 detections an image; nan without a box.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    kinds = range(1 + int(max(targets[..., 0].max(initial=0), detections[..., 0].max(initial=0))))
    boxes = [(image, *row) for image, rows in enumerate(targets.tolist()) for row in rows if row[0] >= 0]
    found = [(image, *row) for image, rows in enumerate(detections.tolist()) for row in rows if row[0] >= 0]
    if not boxes:
        return float("nan"), float("nan")
    truth: Any = COCO()
    guesses: Any = COCO()
    shared = {"images": [{"id": n} for n in range(len(targets))], "categories": [{"id": kind} for kind in kinds]}
    truth.dataset = shared | {
        "annotations": [
            {**_annotation(number, image, kind, corners), "iscrowd": int(crowd)}
            for number, (image, kind, *corners, crowd) in enumerate(boxes, 1)
        ]
    }
    guesses.dataset = shared | {
        "annotations": [
            {**_annotation(number, image, kind, corners), "iscrowd": 0, "score": score}
            for number, (image, kind, score, *corners) in enumerate(found, 1)
        ]
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth.createIndex()
        guesses.createIndex()
        evaluation = COCOeval(truth, guesses, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    mean, at_half = (100 * float(value) if value >= 0 else float("nan") for value in evaluation.stats[:2])
    return mean, at_half


def _annotation(number: int, image: int, kind: float, corners: Sequence[float]) -> dict[str, Any]:
    x0, y0, x1, y1 = corners
    sides = [x0, y0, x1 - x0, y1 - y0]
    return {"id": number, "image_id": image, "category_id": int(kind), "bbox": sides, "area": sides[2] * sides[3]}
