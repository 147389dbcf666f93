"""A regression of the brightness of real digits: its images, its recipe, and small runs of it in this process."""

from pathlib import Path

import numpy as np

from dist_prune.data.datasets import open_source
from dist_prune.run import main as run

WORDS = ("train.epochs=1", "finetune.epochs=0", "report.trackers=[]", "evaluate.batch=17")
RECIPE = """\
name: digits_ink
task: {{name: regression}}
backbone: {{name: resnet8p_cifar, kwargs: {{img_size: 8}}}}
data: {{source: npz_values, root: "{root}", mean: [0.3], std: [0.4]}}
train: {{epochs: 1, batch: 32, lr: 0.05}}
score: {{images: 40, micro_batch: 10}}
method: {{name: l1}}
target: {{macs: 0.5, tolerance: 0.05}}
select: {{round_to: 1}}
finetune: {{epochs: 0, batch: 32}}
report: {{latency_batches: [1, 8], latency_repeats: 2}}
"""


def write(folder: Path) -> Path:
    """The recipe and its images in a folder; returns the recipe."""
    arrays = {}
    for split, train in (("train", True), ("test", False)):
        images = open_source("digits", None, "", train).images[:200]
        arrays |= {f"x_{split}": images, f"y_{split}": images.reshape(len(images), -1).mean(1) / 100}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "ink.npz", **arrays)
    recipe = folder / "digits_ink.yaml"
    recipe.write_text(RECIPE.format(root=folder / "ink.npz"))
    return recipe


def prune(recipe: str | Path, folder: Path, *words: str) -> Path:
    """A run in this process that ends well; returns its directory."""
    assert run(["--recipe", str(recipe), "--run-dir", str(folder), *words]) == 0
    return folder
