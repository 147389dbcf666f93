"""The networks of the benchmark, the images that calibrate and those that judge, and the groups that are cut."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dist_prune as dp
from benchmarks.which_parts.subject import unfold_norms
from dist_prune import methods, models
from dist_prune.config import loading
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.models.torchvision_weights import translate_names
from dist_prune.pipeline.ledger import lock_run_directory
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.run import run

CPU, SEED = torch.device("cpu"), 0
MOST = 500  # images that calibrate, of which a cell takes the first
LOOK = TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TURNED = TransformConfig(224, (0.5,) * 3, (0.5,) * 3, 0.875)
VIT = "vit_cifar10_repair"  # the recipe that trains it
# the groups of "-inner": those inside of a block, whose channels no addition joins
INNER = {
    "mobilenetv2": ["blocks.*.conv_pw"],
    "resnet20": ["layer*.conv1"],
    "resnet56": ["layer*.conv1"],
    "vit": ["blocks.*.mlp.fc1"],
}
MAX_RATIO = {"mobilenetv2": 0.5, "vit": 0.8, "resnet20": 0.8, "resnet56": 0.8}  # of a group, for "-global"
SUFFIXES = ("inner", "global")
Images = tuple[Tensor, Tensor]


@dataclass
class Subject:
    """A dense network and its images.

    Attributes:
        model: in evaluation mode.
        graph: its channel groups.
        calibration: MOST images in the order of the draw, with labels.
        judging: the other images.
        batch: images of a forward pass that fit the processor's caches.
        dense: top-1 in percent on the judging images.
    """

    model: nn.Module
    graph: DependencyGraph
    calibration: Images
    judging: Images
    batch: int
    dense: float = 0.0

    def first(self, count: int) -> Images:
        """The first images of the draw."""
        images, labels = self.calibration
        return images[:count], labels[:count]

    @torch.no_grad()
    def top1(self, model: nn.Module) -> float:
        """Percent of the judging images."""
        pairs = zip(*(part.split(self.batch) for part in self.judging), strict=True)
        return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(self.judging[0])


def parse(case: str) -> tuple[str, set[str]]:
    """The network of a case, and its suffixes.

    Raises:
        SystemExit: one of them is unknown.
    """
    network, *suffixes = case.split("-")
    if network not in INNER or not set(suffixes) <= set(SUFFIXES):
        raise SystemExit(
            f"--cases: {case}: one of {', '.join(INNER)}, perhaps with -inner and -global, as -inner-global"
        )
    return network, set(suffixes)


def selection(case: str) -> dict[str, Any]:
    """Arguments of ``select``: which groups are cut, and how their channels are ranked against one another."""
    network, suffixes = parse(case)
    found: dict[str, Any] = {"include": INNER[network]} if "inner" in suffixes else {}
    if "global" in suffixes:
        return found | {"scope": "global", "max_ratio": MAX_RATIO[network]}
    return found | {"scope": "local"}


def subject(network: str, folder: Path, judge: int) -> Subject:
    """Load a network and its images.

    Args:
        network: a name of ``INNER``.
        folder: of the results; a ViT is trained there if it is not there.
        judge: number of judging images, at most.
    """
    place = Path(os.environ["DIST_PRUNE_DATA"])
    draw = np.random.default_rng(SEED)
    if network == "mobilenetv2":
        source = open_source("imagefolder", str(place / "imagenet_1000_rot180"), "val", False)
        loaders = [ImageLoader(source, TURNED, CPU)] * 2
        order = draw.permutation(len(source.labels))
        ids = order[:MOST], np.sort(order[MOST:])[:judge]
    else:
        path = str(place / "cifar10.npz")
        loaders = [ImageLoader(open_source("npz", path, "", train), LOOK, CPU) for train in (True, False)]
        ids = draw.permutation(50_000)[:MOST], np.arange(judge)
    model = _network(network, place, folder).eval()
    if network == "mobilenetv2":  # its norms are folded into the convolutions; `norms` needs real statistics
        unfold_norms(model, loaders[0], np.sort(ids[0]))
    calibration, judging = map(_load, loaders, ids)
    example = tuple(calibration[0].shape[1:])
    batch = 10 if network == "mobilenetv2" else 100
    found = Subject(model, dp.trace(model, example), calibration, judging, batch)
    found.dense = found.top1(model)
    return found


def _load(loader: ImageLoader, ids: np.ndarray) -> Images:
    batches = list(loader.batches(ids[start : start + 50] for start in range(0, len(ids), 50)))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def _network(network: str, place: Path, folder: Path) -> nn.Module:
    if network == "vit":
        return _vit(folder / "vit")
    if network == "mobilenetv2":
        model, file = models.create("mobilenetv2_100", 1000, 3), "mobilenetv2_imagenet_rot180"
    else:
        model, file = models.create(f"{network}_cifar", 10, 3), f"{network}_cifar10"
    weights = tensor_files.read_weights(place / "weights" / f"{file}.safetensors")
    tensor_files.load_strictly(model, translate_names(weights, model.state_dict()), file)
    return model


def _vit(run_dir: Path) -> nn.Module:
    """The ViT of the recipe, trained if its weights are not there; a stopped training resumes."""
    recipe = loading.load(VIT, [], methods.options_of)
    weights = run_dir / "dense.safetensors"
    if not weights.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        with lock_run_directory(run_dir):
            run(recipe, run_dir, DistributedEnvironment.start(1800, False, False), until="train")
    model = models.create(recipe.backbone.name, 10, 3, kwargs=recipe.backbone.kwargs)
    tensor_files.load_strictly(model, tensor_files.read_weights(weights), str(weights))
    return model


def scores(subject: Subject, file: Path, criterion: str, images: Images) -> tuple[dp.Scores, float]:
    """Scores of a criterion, computed once, and the seconds of the processor that they took.

    Args:
        subject: whose channels are scored.
        file: where scores are kept.
        criterion: name of a method.
        images: the calibration images.
    """
    method = methods.build({"name": criterion})
    if not file.exists():
        start = time.process_time()
        found = dp.score(subject.model, subject.graph, method, [images], micro_batch=16, seed=SEED)
        file.parent.mkdir(parents=True, exist_ok=True)
        tensor_files.save_tensors(file, dict(found), {"cpu_seconds": time.process_time() - start})
    tensors, meta = tensor_files.read_tensors(file)
    return dp.Scores(tensors, method), float(meta["cpu_seconds"])
