"""Small images with rectangles in the colours of their classes, their boxes in two layouts, and small detectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn

from dist_prune.data.box_layouts import open_boxes
from dist_prune.data.box_source import BoxSource
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.random_access import SplitSpec
from dist_prune.models import detectors

CLASSES, SIDE, IMAGES = ("car", "bus"), 64, 11
WIDTH, HEIGHT = 48, 40
SMALL = {  # arguments of torchvision's builders
    "ssdlite320_mobilenet_v3_large": {"width_mult": 0.25},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        "box_batch_size_per_image": 8, "rpn_batch_size_per_image": 16, "rpn_post_nms_top_n_test": 6,
        "rpn_pre_nms_top_n_train": 60, "rpn_post_nms_top_n_train": 30,
    },
}  # fmt: skip
SSD, RCNN = SMALL


def write(root: Path, count: int = IMAGES, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """``count`` images of 48x40 pixels per split with 0 to 3 boxes each; the first has none."""
    boxes: dict[str, list[list[float]]] = {}
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        (root / split / "images").mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 40, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            rows = []
            for _ in range(index % 4):
                width, height = rng.integers(8, 24, 2)
                left, top = rng.integers(0, (WIDTH - width, HEIGHT - height))
                kind = int(rng.integers(0, 2))
                pixels[top : top + height, left : left + width, kind] = 220
                rows.append([kind, *map(int, (left, top, left + width, top + height))])
            Image.fromarray(pixels).save(root / split / "images" / f"{index:03}.png")
            boxes[f"{split}/{index:03}"] = rows
    (root / "boxes.json").write_text(json.dumps({"classes": list(CLASSES), "boxes": boxes}))
    return root


def write_coco(root: Path, of: Path, split: str = "val") -> dict[str, Any]:
    """The split of ``write`` in COCO's form: ROOT/annotations/instances_<split>.json and ROOT/<split>/<name>.png."""
    body = json.loads((of / "boxes.json").read_text())
    names = sorted(key.partition("/")[2] for key in body["boxes"] if key.startswith(split))
    (root / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, name in enumerate(names):
        (root / split / f"{name}.png").write_bytes((of / split / "images" / f"{name}.png").read_bytes())
        images.append({"id": 100 + number, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT})
        for kind, x0, y0, x1, y1 in body["boxes"][f"{split}/{name}"]:
            annotations.append(
                {
                    "id": len(annotations), "image_id": 100 + number, "category_id": (3, 7)[kind],
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0,
                }
            )  # fmt: skip
    categories = [{"id": 7, "name": "bus"}, {"id": 3, "name": "car"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return coco


def source(root: Path, train: bool = True) -> BoxSource:
    return open_boxes(SplitSpec("boxfolder", str(root), "train" if train else "val", train))


def feed(root: Path, train: bool = True, size: int = SIDE, **look: Any) -> ImageLoader:
    transform = TransformConfig(size, (0.0,) * 3, (1.0,) * 3, **{"crop_mode": "squash", **look})
    return ImageLoader(source(root, train), transform, torch.device("cpu"))


def plain(name: str = SSD, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A detector as torchvision makes it, with random weights and batch norms that are no identities."""
    torch.manual_seed(seed)
    arguments = {**SMALL[name], "num_classes": len(CLASSES) + 1, **kwargs}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def network(name: str = SSD, seed: int = 0, **kwargs: Any) -> nn.Module:
    """The same detector, for tensors of images."""
    return detectors.adapt(plain(name, seed, **kwargs))
