"""``dist-prune prune`` on images of CIFAR-10 as PNG files, with and without classes: top-1 on images that it never saw.

    DIST_PRUNE_DATA=... python benchmarks/prune_command.py [--out runs/prune_command] [--train 400] [--test 300]

Needs cifar10.npz and weights/resnet20_cifar10.safetensors. Writes the first images of the training and of the test
split, runs the command with its defaults for macs=0.5 on labelled images (class folders in train and val), on the same
training images without classes, and with batch norms recalibrated alone. Each bundle is judged on the test images.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import dist_prune
from dist_prune.pipeline.git import commit_of

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMS = ("repair.method=none", "finetune.recalibrate_bn=500")
ROWS = {"labelled": (), "labelled, batch norms alone": NORMS, "no classes": (), "no classes, batch norms alone": NORMS}


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray, classes: bool) -> None:
    """Write PNG files, in class folders or in one."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / (f"class_{label}" if classes else "") / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def top1(folder: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Percent of images that a bundle's network classifies right."""
    model = dist_prune.load(folder)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(100)])
    return 100 * float((found == torch.from_numpy(labels)).float().mean())


def main() -> None:
    """Run the commands and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/prune_command", help="folder; must be new")
    parser.add_argument("--train", type=int, default=400, help="training images that the command gets")
    parser.add_argument("--test", type=int, default=300, help="test images that it gets; all 10,000 judge the bundles")
    given = parser.parse_args()
    data = Path(os.environ["DIST_PRUNE_DATA"])
    arrays = np.load(data / "cifar10.npz")
    train = arrays["x_train"][: given.train], arrays["y_train"][: given.train].astype(np.int64)
    test = arrays["x_test"], arrays["y_test"].astype(np.int64)
    given.out.mkdir(parents=True)
    write_images(given.out / "images/train", *train, True)
    write_images(given.out / "images/val", test[0][: given.test], test[1][: given.test], True)
    write_images(given.out / "flat", *train, False)
    print(f"{'images':32}{'method':18}{'MACs':>7}{'dense':>9}{'pruned':>9}{'mended':>9}{'10,000 test images':>20}")
    for row, words in ROWS.items():
        place = given.out / row.replace(", ", "_").replace(" ", "_")
        command = [
            sys.executable, "-m", "dist_prune.cli", "prune", str(data / "weights/resnet20_cifar10.safetensors"),
            "--backbone", "resnet20_cifar", "--data", str(given.out / ("flat" if row.startswith("no") else "images")),
            "--output", str(place), "--json", f"data.mean={list(MEAN)}", f"data.std={list(STD)}", *words,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):  # 3: the target is missed by more than its tolerance
            raise SystemExit(done.stderr)
        body = json.loads(done.stdout)
        dense, pruned, mended = body["figures"].values()
        share = mended["macs"] / dense["macs"]
        print(
            f"{row:32}{body['method']:18}{share:7.3f}{dense['top1']:9.2f}{pruned['top1']:9.2f}{mended['top1']:9.2f}"
            f"{top1(place / 'export', *test):20.2f}",
            flush=True,
        )
    print(f"torch {torch.__version__}, {os.environ['OMP_NUM_THREADS']} thread, commit {commit_of(Path(__file__))}")


if __name__ == "__main__":
    main()
