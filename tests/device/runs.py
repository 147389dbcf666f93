"""What the pretend device's processes do (tests/support/pool.py): the same work on it and on the CPU, in plain values.

``kind`` is "pretend" or "cpu"; every function starts the device in its process and takes ``ranks`` first.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import dist_prune
import dist_prune as dp
from dist_prune import methods, run
from dist_prune.analysis.ratio_curves import RatioRequest, measure
from dist_prune.config import loading
from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.open_split import open_split
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.export import bundle
from dist_prune.export.fuse_bn import fuse_bn
from dist_prune.methods.base import TRAINED
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.sparse_learning import sparsity_gradient
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.bn_recalibration import recalibrate_bn
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.evaluation import evaluate
from dist_prune.training.latency import measure_latency
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer
from tests.support import pretend_device, tiny
from tests.support.launch import SMALL
from tests.training.test_training import Killed, kill_after

TARGET = SelectionRequest(target=("macs", 0.5))
SOME = np.arange(70)  # images that are judged: not a multiple of the batch


def machine(ranks: Communicator, kind: str) -> DistributedEnvironment:
    """A machine of that kind; collectives of its tensors go through gloo."""
    device = pretend_device.start()
    device = device if kind == "pretend" else torch.device("cpu")
    return DistributedEnvironment(device, replace(ranks, device=device))


def feed(at: DistributedEnvironment, dtype: torch.dtype = torch.float64, **look: Any) -> ImageLoader:
    """The digits."""
    return ImageLoader(
        open_source("digits", None, "", True), TransformConfig(8, (0.3,), (0.4,), **look), at.device, dtype=dtype
    )


def bench(
    at: DistributedEnvironment, images: int = tiny.IMAGES, dtype: torch.dtype = torch.float64
) -> DistributedScoringContext:
    """tiny.bench on that machine."""
    model = tiny.network().to(dtype)
    channels = trace_groups(model, tiny.example()[:1].to(dtype))
    return DistributedScoringContext(
        model.to(at.device), channels, feed(at, dtype), np.arange(images), at, Tracker(False), tiny.MICRO, 0, None,
        "test", 1,
    )  # fmt: skip


def trainer(
    at: DistributedEnvironment,
    model: nn.Module,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> Trainer:
    """A short training of a network, judged on some images."""
    plain = {"epochs": 1, "batch": 32, "lr": 0.05, "images": 96, "selection": "last"}
    images = feed(at, dtype, augment="crop_flip")
    loop = Loop(Training(**(plain | more)), images, at, Tracker(False), 0)

    def judge(network: nn.Module) -> Mapping[str, float]:
        return evaluate(network, images, 32, at.comm, Tracker(False), ids=SOME)

    states = CheckpointManager(folder, "me", say=lambda text: None) if folder else None
    return Trainer(model, loop, judge, checkpoints=states, classes=10)


def digest(tensors: Mapping[str, Tensor]) -> list[float]:
    """One number per tensor."""
    return [float(tensor.detach().double().sum()) for tensor in tensors.values()]


def plain(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Figures without times."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s", "data_wait")} for line in history]


def planned(ranks: Communicator, kind: str, name: str) -> str:
    """Fingerprint of a method's plan."""
    work, method = bench(machine(ranks, kind)), tiny.method(name)
    return method.select(method.score(work), work.graph, TARGET).fingerprint


def whole(ranks: Communicator, kind: str, name: str) -> dict[str, Any]:
    """Scored, selected, pruned, finetuned, evaluated."""
    at = machine(ranks, kind)
    work, method = bench(at), tiny.method(name)
    scores = method.score(work)
    plan = method.select(scores, work.graph, TARGET)
    small = tiny.network().to(at.device)
    trained = {key.removeprefix(TRAINED): value for key, value in scores.items() if key.startswith(TRAINED)}
    if trained:
        small.load_state_dict(trained)
    surgeon.apply_plan(small, work.graph, plan)
    pruned = evaluate(small, work.loader, 32, at.comm, Tracker(False), ids=SOME)
    history = trainer(at, small).run()
    tuned = evaluate(small, work.loader, 32, at.comm, Tracker(False), ids=SOME)
    return {"plan": plan.fingerprint, "pruned": pruned, "history": plain(history), "tuned": tuned}


def _masked(found: Trainer, at: DistributedEnvironment) -> None:
    weight = dict(found.model.named_parameters())["layer1.0.conv1.weight"]
    mask = torch.ones(weight.shape, dtype=torch.bool)
    mask[::2] = False
    found.masks = {"layer1.0.conv1.weight": mask}


def _penalised(kind: str) -> Callable[[Trainer, DistributedEnvironment], None]:
    def prepare(found: Trainer, at: DistributedEnvironment) -> None:
        channels = trace_groups(tiny.network(), tiny.example()[:1])
        found.penalty = sparsity_gradient(kind, found.model, channels, 1e-3)

    return prepare


def _taught(found: Trainer, at: DistributedEnvironment) -> None:
    found.teacher = tiny.network(1).to(next(found.model.parameters()).dtype)


# option -> (settings, dtype, what else is done to the trainer before it runs)
SINGLE, DOUBLE = torch.float32, torch.float64
EVERYTHING = {
    "accumulate": 2, "clip_grad": 0.1, "ema": 0.9, "channels_last": True, "mixup": 0.2, "skip_nonfinite": 1,
}  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], torch.dtype, Callable[[Trainer, DistributedEnvironment], None] | None]] = {
    "plain": ({}, DOUBLE, None),
    "ema": ({"ema": 0.9}, DOUBLE, None),
    "mixup": ({"mixup": 0.2}, DOUBLE, None),
    "cutmix": ({"cutmix": 1.0, "label_smoothing": 0.1}, DOUBLE, None),
    "distillation": ({"distill": 0.5}, SINGLE, _taught),
    "clipping": ({"clip_grad": 0.1}, DOUBLE, None),
    "accumulation": ({"accumulate": 2}, DOUBLE, None),
    "channels_last": ({"channels_last": True}, DOUBLE, None),
    "masks": ({}, DOUBLE, _masked),
    "bn_scale": ({"sparsity": "bn_scale", "sparsity_weight": 1e-3}, DOUBLE, _penalised("bn_scale")),
    "group_norm": ({"sparsity": "group_norm", "sparsity_weight": 1e-3}, DOUBLE, _penalised("group_norm")),
    "skip_nonfinite": ({"skip_nonfinite": 1}, DOUBLE, None),
    # what else a recipe may say, in two trainings
    "schedules": (
        {
            "freeze_bn": True,
            "nesterov": True,
            "lr_scales": {"layer1.*": 0.5},
            "epochs": 2,
            "warmup_epochs": 1,
            "schedule": "cosine",
            "decay_norm_bias": False,
            "mixup": 0.2,
            "mix_prob": 0.5,
            "selection": "holdout",
            "patience": 1,
        },
        DOUBLE,
        None,
    ),
    "onecycle": ({"schedule": "onecycle", "optimizer": "lamb", "lr": 1e-3, "save_every_steps": 1}, DOUBLE, None),
    **{
        f"{precision}, everything": ({"precision": precision, **EVERYTHING}, SINGLE, None)
        for precision in ("bf16", "fp16")
    },
    "adamw": ({"optimizer": "adamw", "lr": 1e-3}, DOUBLE, None),
    "bf16": ({"precision": "bf16"}, SINGLE, None),
    "fp16": ({"precision": "fp16"}, SINGLE, None),
}


def option(ranks: Communicator, kind: str, name: str, precision: str = "", **more: Any) -> dict[str, Any]:
    """A training with one option (and perhaps another precision): figures and a digest of the weights."""
    at = machine(ranks, kind)
    asked, dtype, prepare = OPTIONS[name]
    more |= {"precision": precision} if precision else {}
    found = trainer(at, tiny.network().to(dtype), dtype=dtype, **(asked | more))
    if prepare is not None:
        prepare(found, at)
    history = found.run()
    return {"history": plain(history), "weights": digest(found.model.state_dict())}


def synchronised(ranks: Communicator) -> dict[str, Any]:
    """torch's SyncBatchNorm over the ranks."""
    return option(ranks, "pretend", "plain", sync_bn=ranks.world > 1)


def resumed(ranks: Communicator, kind: str, folder: Path, killed: int) -> list[float]:
    """Killed after some updates and run again; 0: never killed."""
    at = machine(ranks, kind)
    more: dict[str, Any] = {"ema": 0.9, "mixup": 0.2, "epochs": 2}
    if killed:
        first = trainer(at, tiny.network(), folder, save_every_steps=2, **more)
        kill_after(first, killed)
        with contextlib.suppress(Killed):
            first.run()
        first.checkpoints.wait()  # type: ignore[union-attr]
    found = trainer(at, tiny.network(), folder if killed else None, save_every_steps=2, **more)
    found.run()
    assert found.resumed is None or killed
    return digest(found.model.state_dict())


def carried(ranks: Communicator, kind: str) -> list[float]:
    """Optimizer state that is cut with the network and goes on in a second training."""
    at = machine(ranks, kind)
    first = trainer(at, tiny.network(), ema=0.9)
    first.keep_state = True
    first.run()
    model = tiny.network()
    channels = trace_groups(model, tiny.example()[:1])
    method = methods.find("l1")
    work = DistributedScoringContext(first.model, channels, feed(at), np.arange(7), at, Tracker(False), tiny.MICRO)
    made = method(method.Options())
    plan = made.select(made.score(work), channels, TARGET)
    assert first.final_state is not None
    left = first.final_state.prune(lambda named: _cut(named, channels, plan))
    small = tiny.cut(first.model, channels, plan)
    small.load_state_dict(left.tables["model"])
    second = trainer(at, small, ema=0.9)
    second.carried = left
    second.run()
    return digest(second.model.state_dict())


def _cut(named: Mapping[str, Tensor], channels: Any, plan: Plan) -> dict[str, Tensor]:
    """Tensors shaped as parameters and buffers, cut as the network is."""
    model = tiny.network()
    full = {**model.state_dict(), **named}
    model.load_state_dict(full)
    surgeon.apply_plan(model, channels, plan)
    return {name: tensor for name, tensor in model.state_dict().items() if name in named}


def crossed(ranks: Communicator, first: str, second: str, folder: Path) -> list[float]:
    """Killed on one kind of machine, run to the end on the other."""
    for kind, killed in ((first, 3), (second, 0)):
        found = trainer(machine(ranks, kind), tiny.network(), folder, save_every_steps=2, epochs=2, ema=0.9, mixup=0.2)
        if killed:
            kill_after(found, killed)
            with contextlib.suppress(Killed):
                found.run()
            found.checkpoints.wait()  # type: ignore[union-attr]
        else:
            found.run()
            assert found.resumed == {"epoch": 0, "step": 2}
    return digest(found.model.state_dict())


def connected(ranks: Communicator) -> dict[str, Any]:
    """[sum of 1 and 2 over two ranks, syncs for it] before and after a group for the CPU is opened, and words."""
    at = replace(machine(ranks, "pretend").comm, control=None)
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        with pretend_device.counting() as traffic:
            found[when] = [*at.sum_ints(1 + at.rank), min(traffic.syncs, 1)]
        at.connect(60)
    return found | {"words": at.all_gather_object(str(at.rank))}


def recalibrated(ranks: Communicator, kind: str) -> list[float]:
    """New batch-norm statistics."""
    at = machine(ranks, kind)
    model = tiny.network().to(at.device)
    recalibrate_bn(model, feed(at), SOME, 16, at.comm)
    return digest(model.state_dict())


def images(ranks: Communicator, kind: str, look: Mapping[str, Any], place: str = "") -> list[float]:
    """What the loaders' tail makes of training images: sums of their pixels and labels, batch by batch."""
    at = machine(ranks, kind)
    if place:
        source = open_split("torch", "imagefolder", place, "train", True).source
    else:
        source = open_source("digits", None, "", True)
    tone = {"mean": (0.3,) * source.in_chans, "std": (0.4,) * source.in_chans}
    found = ImageLoader(source, TransformConfig(8, **tone, **look), at.device)
    out = []
    for part in found.batches([np.arange(7), np.arange(5)[::-1]], (0, 1)):
        assert part.images.device == part.labels.device == at.device
        out += [
            float(part.images.double().sum()),
            float((part.labels * torch.arange(len(part.ids)).to(at.device)).sum()),
        ]
    found.close()
    return out


def served(ranks: Communicator, kind: str, folder: Path) -> dict[str, Any]:
    """A bundle that is loaded and put on the device: logits, plain and folded, and whether its time can be taken."""
    at = machine(ranks, kind)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(at.device)
    model = dist_prune.load(folder).to(at.device)
    with torch.no_grad():
        logits = model(x).tolist()
        folds = fuse_bn(model, x)
        folded = model(x).tolist()
    again = dist_prune.load(folder, fold=True).to(at.device)
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-5)
    times = measure_latency({"pruned": dist_prune.load(folder)}, (1, 8, 8), (1, 4), 2, at.device, 1)
    return {"logits": logits, "folds": folds, "folded": folded, "timed": sorted(times["pruned"])}


def bundled(ranks: Communicator, kind: str, folder: Path) -> str:
    """A network that was cut on the device, as a bundle: digest of its weights."""
    at = machine(ranks, kind)
    work, method = bench(at), tiny.method("l1")
    plan = method.select(method.score(work), work.graph, TARGET)
    weights = tiny.cut(work.model, work.graph, plan).float().state_dict()
    spec = {"name": "resnet8p_cifar", "kwargs": {"img_size": 8}, "num_classes": 10, "in_chans": 1}
    image = {"size": 8, "mean": [0.3], "std": [0.4], "crop": 1.0, "interpolation": "bilinear", "crop_mode": "center"}
    folder.mkdir(parents=True, exist_ok=True)
    text = bundle.manifest_json(spec, plan, image, tuple("0123456789"), weights, {})
    (folder / bundle.MANIFEST).write_text(text)
    tensor_files.save_tensors(folder / bundle.WEIGHTS, weights)
    return bundle.weights_digest(weights)


def run_of(ranks: Communicator, kind: str, folder: Path, words: list[str]) -> dict[str, Any]:
    """All stages of the quickstart, made small, and ratio curves: plans, tables and accuracies."""
    at = machine(ranks, kind)
    spec = loading.load("quickstart", [*SMALL, *words], methods.options_of)
    found: list[Any] = []

    def then(context: Any) -> None:
        if spec.method["name"] == "l1":
            found.append(repr(measure(context, RatioRequest((0.8, 0.3), 60))))

    run.run(spec, folder, at, then=then)
    kept = [file for name in ("plan.json", "curves.csv") for file in sorted(folder.glob(f"**/{name}"))]
    body = json.loads((folder / "report.json").read_text())
    return {
        "files": {str(file.relative_to(folder)): file.read_text() for file in kept},
        "top1": [body[name]["top1"] for name in ("dense", "pruned", "finetuned")], "ratios": found,
    }  # fmt: skip


def library(ranks: Communicator, kind: str, method: str) -> dict[str, Any]:
    """The library's lines with the network on the device and the user's batches on the host."""
    device = machine(ranks, kind).device
    alone = mock.patch("torch.distributed.is_initialized", return_value=False)  # the pool is a group of two
    with alone if ranks.world == 1 else contextlib.nullcontext():
        return _library(ranks, device, method)


def _library(ranks: Communicator, device: torch.device, method: str) -> dict[str, Any]:
    source = open_source("digits", None, "", True)
    images = torch.from_numpy(source.images[:64]).permute(0, 3, 1, 2).double() / 16  # type: ignore[index]
    labels = torch.from_numpy(source.labels[:64])
    loader = list(zip(images.split(16), labels.split(16), strict=True))
    model = tiny.network().to(device)
    graph = dp.trace(model, (1, 8, 8))
    scores = dp.score(model, graph, method, loader, micro_batch=16, group=ranks.group)
    plan = dp.select(scores, graph, target={"macs": 0.6})
    small = dp.prune(model, plan)
    repaired = dp.repair(model, small, plan, loader, group=ranks.group)
    normed = dp.repair(model, small, plan, loader, method="norms", group=ranks.group)
    searched = dp.search(
        model,
        scores,
        graph,
        loader,
        target={"macs": 0.6},
        candidates=6,
        repair_images=16,
        micro_batch=16,
        group=ranks.group,
    )
    weights = (digest(one.state_dict()) for one in (small, repaired, normed))
    places = {str(p.device.type) for one in (small, repaired, normed) for p in one.parameters()}
    return {"plan": plan.fingerprint, "searched": searched.fingerprint, "weights": list(weights), "places": places}
