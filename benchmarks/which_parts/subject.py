"""The pretrained networks of the study, their images, and what scoring costs counted in forward passes."""

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dist_prune import models
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import calibration_ids, holdout_split, micro_batches
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.models.torchvision_weights import translate_names
from dist_prune.pruning.surgery.verified_trace import trace_groups

LOOK = TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), augment="crop_flip")
TURNED = TransformConfig(224, (0.5,) * 3, (0.5,) * 3)
HELD_OUT = 0.1  # of the training images, for decisions


class Subject:
    """A pretrained network with its channel groups, and the images of each purpose.

    Attributes:
        model: in evaluation mode; it is scored.
        cuttable: the same function, whose batch norms can be recalibrated; it is cut.
        channels: its channel groups.
        machine: this process.
        train: the images that ``usable`` and ``decide`` number.
        test: the images that ``report`` numbers.
        usable: ids for calibration and finetuning.
        decide: ids of held-out training images. No network of the study is trained on them, but the pretrained
            weights were. None of MobileNetV2.
        report: ids of the images of the reported figures.
        batch: images of an evaluation's forward pass that fit the processor's caches.
    """

    def __init__(self, name: str, limit: int | None = None):
        self.name, self.machine = name, DistributedEnvironment.single_process()
        self.decide, self.batch = np.arange(0), 5 if name == "mobilenetv2" else 20
        if name == "mobilenetv2":
            self._open_imagenet()
        else:
            self._open_cifar(int(name.removeprefix("resnet")))
        if limit is not None:
            self.usable, self.decide, self.report = (ids[:limit] for ids in (self.usable, self.decide, self.report))
        size = self.train.transform.size
        self.channels = trace_groups(self.model, torch.zeros(1, 3, size, size))

    def _open_cifar(self, depth: int) -> None:
        place = Path(os.environ["DIST_PRUNE_DATA"])
        self.model = self.cuttable = models.create(f"resnet{depth}_cifar", 10, 3).eval()
        weights = place / f"weights/resnet{depth}_cifar10.safetensors"
        tensor_files.load_strictly(self.model, tensor_files.read_weights(weights), str(weights))
        self.train, self.test = (
            ImageLoader(open_source("npz", str(place / "cifar10.npz"), "", train), LOOK, self.machine.device)
            for train in (True, False)
        )
        self.usable, self.decide = holdout_split(np.arange(len(self.train)), HELD_OUT, 0)
        self.report = np.arange(len(self.test))

    def _open_imagenet(self) -> None:
        """The thousand images, one a class: even classes calibrate, odd ones are judged."""
        place = Path(os.environ["DIST_PRUNE_DATA"])
        self.model = models.create("mobilenetv2_100", 1000, 3).eval()
        weights = tensor_files.read_weights(place / "weights/mobilenetv2_imagenet_rot180.safetensors")
        tensor_files.load_strictly(self.model, translate_names(weights, self.model.state_dict()), "the weights")
        folder = open_source("imagefolder", str(place / "imagenet_1000_rot180"), "val", True)
        pixels = np.stack([_crop(folder.fetch(number)) for number in range(len(folder.labels))])
        source = ArraySource(pixels, folder.labels, folder.classes)
        self.train = self.test = ImageLoader(source, TURNED, self.machine.device)
        self.usable, self.report = (np.flatnonzero(source.labels % 2 == odd) for odd in (0, 1))
        self.cuttable = copy.deepcopy(self.model)
        unfold_norms(self.cuttable, self.train, self.usable)

    def calibration(self, images: int, seed: int) -> np.ndarray:
        """Ids of calibration images, as many of each class."""
        labels = self.train.source.labels[self.usable]
        return self.usable[calibration_ids(labels, images, seed, "class")]


def _crop(file: Any) -> np.ndarray:
    """The centre 224 pixels of an image whose short side has 256."""
    with Image.open(file) as image:
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        return np.asarray(image.convert("RGB").crop((left, top, left + 224, top + 224)))


@torch.no_grad()
def unfold_norms(model: nn.Module, loader: ImageLoader, ids: np.ndarray, micro: int = 5) -> None:
    """Give batch norms that are the identity the statistics of real images, without changing the function.

    Folded norms have mean 0 and variance 1 whatever enters them, so they cannot be recalibrated. Afterwards mean and
    variance are those of the images, and scale and shift undo them.

    Args:
        model: in evaluation mode; its norms are changed in place.
        loader: the images.
        ids: (n,) the images that are used.
        micro: images of one forward pass.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    sums = {norm: torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms}
    counts = dict.fromkeys(norms, 0)

    def hook(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        sums[norm] += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        counts[norm] += x.numel() // x.shape[1]

    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    for batch in loader.batches(micro_batches(ids, micro)):
        model(batch.images)
    for handle in handles:
        handle.remove()
    for norm in norms:
        mean, square = sums[norm] / counts[norm]
        var = (square - mean.square()).clamp_min(0)
        assert norm.running_mean is not None and norm.running_var is not None
        slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        norm.bias.copy_(norm.bias.double() + slope * (mean - norm.running_mean.double()))
        norm.weight.copy_(slope * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


@dataclass
class Cost:
    """Multiply-accumulates of convolutions and linear layers, and processor time.

    Attributes:
        forward: of forward passes.
        backward: of the layers that a gradient passed, counted once each as in the forward pass.
        seconds: of this process on its processors.
    """

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0


@contextmanager
def counted() -> Iterator[Cost]:
    """A context that counts what all networks in this process compute, copies and cut networks included."""
    cost, start = Cost(), time.process_time()

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(module, nn.Conv2d | nn.Linear):
            return
        macs = output.numel() * module.weight[0].numel()
        cost.forward += macs

        def passed(_gradient: Tensor) -> None:
            cost.backward += macs

        if output.requires_grad:
            output.register_hook(passed)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield cost
    finally:
        handle.remove()
        cost.seconds = time.process_time() - start
