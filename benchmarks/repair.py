"""Top-1 after surgery, repaired and not, without finetuning: criteria, methods of repair and numbers of images.

    python benchmarks/repair.py OUT [--cases mobilenetv2:0.9,resnet56:0.5] [--criteria l1,taylor,reconstruction,random]
        [--repairs none,norms,bias,least_squares] [--images 64,256,500] [--judge 500] [--table]

Needs $DIST_PRUNE_DATA. OUT gets one JSON file for each cell, and cells that are there are not computed again. Images
that calibrate never judge: 500 of the 1,000 ImageNet images calibrate MobileNetV2 and the other 500 judge; CIFAR-10
networks are calibrated on training images and judged on test images. --table prints what is there and computes nothing.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import dist_prune as dp
from dist_prune import models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed import tensor_files
from dist_prune.fileio import write_atomic
from dist_prune.models.torchvision_weights import translate_names

CPU, SEED = torch.device("cpu"), 0
INNER = {"include": ["blocks.*.conv_pw"]}  # the expansions of MobileNetV2 alone
# case -> how channels are ranked against one another; "-macs": over all groups, reconstruction by loss per MAC
SELECT: dict[str, dict[str, Any]] = {
    "mobilenetv2": {"scope": "local"},
    "mobilenetv2-inner": {"scope": "local", **INNER},
    "mobilenetv2-macs": {"scope": "global", "max_ratio": 0.5, **INNER},
    "resnet20": {"scope": "local"},
    "resnet56": {"scope": "local"},
    "resnet20-macs": {"scope": "global", "max_ratio": 0.8},
    "resnet56-macs": {"scope": "global", "max_ratio": 0.8},
}
Images = tuple[Tensor, Tensor]


def network(case: str) -> tuple[nn.Module, ImageLoader, ImageLoader]:
    """The dense network of a case, and the loaders of the images that calibrate and that judge."""
    place = Path(os.environ["DIST_PRUNE_DATA"])
    if case.startswith("mobilenetv2"):
        model, file = models.create("mobilenetv2_100", 1000, 3), "mobilenetv2_imagenet_rot180"
        half = (0.5, 0.5, 0.5)
        source = open_source("imagefolder", str(place / "imagenet_1000_rot180"), "val", False)
        both = (ImageLoader(source, TransformConfig(224, half, half, 0.875), CPU),) * 2
    else:
        name = case.removesuffix("-macs")
        model, file = models.create(f"{name}_cifar", 10, 3), f"{name}_cifar10"
        look = TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        path = str(place / "cifar10.npz")
        both = tuple(ImageLoader(open_source("npz", path, "", train), look, CPU) for train in (True, False))
    weights = tensor_files.read_weights(place / "weights" / f"{file}.safetensors")
    tensor_files.load_strictly(model, translate_names(weights, model.state_dict()), file)
    return model.eval(), both[0], both[1]


def split(case: str, judge: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the images that calibrate (of which the first are taken) and of those that judge."""
    draw = np.random.default_rng(SEED)
    if case.startswith("mobilenetv2"):
        order = draw.permutation(1000)
        return order[:500], np.sort(order[500:])[:judge]
    return draw.permutation(50_000)[:500], np.arange(judge)


def load(loader: ImageLoader, ids: np.ndarray) -> Images:
    batches = list(loader.batches(ids[start : start + 50] for start in range(0, len(ids), 50)))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


@torch.no_grad()
def top1(model: nn.Module, images: Images) -> float:
    pairs = zip(images[0].split(50), images[1].split(50), strict=True)
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images[0])


def measure(cell: dict[str, Any], folder: Path, repairs: list[str], judge: int) -> None:
    """Score once, cut once, and repair in each way whose file is missing."""
    case, criterion, count = cell["case"], cell["criterion"], cell["images"]
    missing = [repair for repair in repairs if not place_of(folder, cell | {"repair": repair}).exists()]
    if not missing:
        return
    model, calibrating, judging = network(case)
    ids, judge_ids = split(case, judge)
    calibration, judged = load(calibrating, np.sort(ids[:count])), load(judging, judge_ids)
    example = tuple(calibration[0].shape[1:])
    graph = dp.trace(model, example)
    start = time.perf_counter()
    options: dict[str, Any] = {"per": "macs"} if case.endswith("-macs") and criterion == "reconstruction" else {}
    scores = dp.score(model, graph, criterion, [calibration], micro_batch=16, seed=SEED, **options)
    scoring = time.perf_counter() - start
    plan = dp.select(scores, graph, target={"macs": cell["macs"]}, seed=SEED, **SELECT[case])
    small = dp.prune(model, plan)
    dense = top1(model, judged)
    for repair in cast(list[Any], missing):
        start, cpu = time.perf_counter(), time.process_time()
        repaired = small if repair == "none" else dp.repair(model, small, plan, [calibration], method=repair)
        facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        figures = {"dense": dense, "top1": top1(repaired, judged), "judge": len(judge_ids), "score_seconds": scoring}
        line = cell | {"repair": repair} | facts | figures | {"threads": torch.get_num_threads()}
        write_atomic(place_of(folder, line), json.dumps(line, indent=1))
        print(f"{case} {cell['macs']} {criterion} {count} {repair}: {figures['top1']:.2f} %", flush=True)


def place_of(folder: Path, cell: dict[str, Any]) -> Path:
    return folder / "_".join(str(cell[key]) for key in ("case", "macs", "criterion", "images", "repair")) / "cell.json"


def table(folder: Path) -> str:
    """All cells that are there, a line for each case, criterion and number of images."""
    cells = [json.loads(file.read_text()) for file in sorted(folder.glob("*/cell.json"))]
    names = [
        name for name in ("none", "norms", "bias", "fold", "least_squares") if any(c["repair"] == name for c in cells)
    ]
    lines = [f"| network | MACs | dense % | criterion | images | {' | '.join(names)} | s (CPU s) of least squares |"]
    lines.append("|---" * (6 + len(names)) + "|")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells:
        key = (cell["case"], cell["macs"], f"{cell['dense']:.2f}", cell["criterion"], cell["images"])
        rows.setdefault(key, {})[cell["repair"]] = cell
    for key, found in sorted(rows.items()):
        shown = [f"{found[name]['top1']:.2f}" if name in found else "" for name in names]
        last = found.get("least_squares")
        took = f"{last['seconds']:.0f} ({last['cpu_seconds']:.0f})" if last else ""
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(shown)} | {took} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default="mobilenetv2:0.9,mobilenetv2:0.7,resnet20:0.5,resnet56:0.5")
    parser.add_argument("--criteria", default="l1,taylor,reconstruction,random")
    parser.add_argument("--repairs", default="none,norms,bias,least_squares")
    parser.add_argument("--images", default="64,256,500")
    parser.add_argument("--judge", type=int, default=500)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    for item in () if given.table else given.cases.split(","):
        case, macs = item.split(":")
        for count in map(int, given.images.split(",")):
            for criterion in given.criteria.split(","):
                cell = {"case": case, "macs": float(macs), "criterion": criterion, "images": count}
                measure(cell, given.out, given.repairs.split(","), given.judge)
    print(table(given.out))


if __name__ == "__main__":
    main()
