"""Criteria of the entropy method against l1 and random, on LeNet6-16/MNIST and the pretrained CIFAR-10 ResNets.

    python benchmarks/entropy_study.py curves --out FOLDER [--seeds 0 1 2] [--criteria NAME ...] [--minutes 5]
    python benchmarks/entropy_study.py budgets --out FOLDER [--seeds 0] [--epochs 1] [--minutes 5]
    python benchmarks/entropy_study.py resnet --out FOLDER [--depth 20 56] [--seeds 0 1 2] [--tested 2000] [--minutes 5]

``curves``: every layer of LeNet at every count, nothing finetuned; the mean top-1 over all counts, and the rank
correlation of orders between calibration seeds. ``budgets``: all layers at relative parameters 0.5, 0.2, 0.1, 0.03,
after finetuning. ``resnet``: layers inside blocks at half their filters, before any finetuning.
What is finished lies in FOLDER and is not made again, so a study can be cut into pieces of ``--minutes``; a last call
prints the table. Needs DIST_PRUNE_DATA with MNIST/, cifar10.npz and weights/.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from dist_prune import methods, models
from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.base import Method
from dist_prune.pipeline.git import commit_of
from dist_prune.pruning.hooks.gating import gate, gate_points
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import evaluate, num_correct
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

IMAGES = 500  # calibration: 5 batches of 100
CRITERIA: dict[str, tuple[str, dict[str, Any]]] = {
    "mi_rest": ("entropy", {}),
    "mi_rest aligned": ("entropy", {"sampling": "reyei_uns"}),  # the widths of the paper and of its program
    "joint": ("entropy", {"criterion": "joint"}),
    "relevance": ("entropy", {"criterion": "relevance"}),
    "entropy": ("entropy", {"criterion": "entropy"}),
    "binning": ("entropy", {"estimator": "binning"}),
    "l1": ("l1", {}),
    "random": ("random", {}),
}
BUDGETS = (0.5, 0.2, 0.1, 0.03)


def method(criterion: str) -> Method:
    name, options = CRITERIA[criterion]
    kind = methods.find(name)
    return kind(kind.Options.model_validate(options))


class Network:
    """A dense network, its channels, and both splits."""

    def __init__(self, model: nn.Module, look: TransformConfig, source: str, root: str):
        self.machine, self.model = DistributedEnvironment.single_process(), model
        feeds = [
            ImageLoader(open_source(source, root, "", train), look, self.machine.device) for train in (True, False)
        ]
        self.train, self.test = feeds
        shape = (1, self.train.source.in_chans, look.size, look.size)
        self.channels = trace_groups(model.eval(), torch.randn(shape))

    def scores(self, criterion: str, seed: int) -> dict[str, Tensor]:
        ids = calibration_ids(self.train.source.labels, IMAGES, seed)
        bench = DistributedScoringContext(
            self.model, self.channels, self.train, ids, self.machine, Tracker(False), seed=seed
        )
        return method(criterion).score(bench)

    def top1(self, model: nn.Module, tested: int = 10_000) -> float:
        return evaluate(model, self.test, 250, self.machine.comm, Tracker(False), ids=np.arange(tested))["top1"]

    def fit(self, model: nn.Module, settings: Training, seed: int) -> None:
        ids = np.arange(len(self.train))
        loop = Loop(settings, self.train, self.machine, Tracker(False), seed, "study", ids)
        Trainer(model, loop, lambda network: {"top1": 0.0, "loss": 0.0}, classes=10).run()
        model.eval()


def lenet(out: Path) -> Network:
    """LeNet6-16, trained once: 6 epochs, SGD 0.1 without momentum as the paper, batch 64 instead of 256."""
    file = out / "lenet.safetensors"
    torch.manual_seed(0)
    network = Network(models.create("lenet6_16", 10, 1), TransformConfig(28, (0.0,), (1.0,)), "mnist", os.environ[DATA])
    if file.is_file():
        network.model.load_state_dict(tensor_files.read_tensors(file)[0])
    else:
        network.fit(network.model, _settings(6, 64), 0)
        tensor_files.save_tensors(file, network.model.state_dict())
    network.model.eval()
    return network


def resnet(depth: int) -> Network:
    place = Path(os.environ[DATA])
    model = models.create(f"resnet{depth}_cifar", 10, 3)
    weights = place / f"weights/resnet{depth}_cifar10.safetensors"
    tensor_files.load_strictly(model, tensor_files.read_weights(weights), str(weights))
    look = TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Network(model, look, "npz", str(place / "cifar10.npz"))


DATA = "DIST_PRUNE_DATA"


def _settings(epochs: int, batch: int) -> Training:
    return Training(
        epochs=epochs, batch=batch, lr=0.1, momentum=0, weight_decay=0, schedule="constant", selection="last"
    )


@torch.no_grad()
def curve(network: Network, group: str, order: Sequence[int]) -> list[float]:
    """Top-1 on all test images with the last 1, 2, ... filters of a group.

    The network runs once as far as the layer that consumes the group; what comes before no mask can change.
    """
    model, points = network.model, gate_points(network.channels, group)
    reader = points[0].point.layer
    names = [name for name, _ in model.named_children() if name != "activation"]
    first = names.index(reader)
    stays = torch.zeros((len(order), len(order)), dtype=torch.bool)
    for kept in range(1, len(order) + 1):
        stays[kept - 1, list(order[len(order) - kept :])] = True
    correct, total = torch.zeros(len(order)), 0
    for part in network.test.batches([np.arange(i, i + 500) for i in range(0, 10_000, 500)]):
        seen: list[Tensor] = []
        handle = model.get_submodule(reader).register_forward_pre_hook(lambda _m, x, seen=seen: seen.append(x[0]))
        model(part.images)
        handle.remove()
        total += len(part.labels)
        for start in range(0, len(order), 8):
            some = stays[start : start + 8]
            x = seen[0].repeat(len(some), *[1] * (seen[0].dim() - 1))
            with gate(model, points, {group: some}):
                for name in names[first:]:
                    x = model.get_submodule(name)(x.flatten(1) if name.startswith(("fc", "head")) else x)
                    x = torch.relu(x) if name.startswith("conv") else torch.tanh(x) if name.startswith("fc") else x
            correct[start : start + 8] += num_correct(x.view(len(some), len(part.labels), -1), part.labels)
    return (100 * correct / total).tolist()


class Notes:
    """Finished pieces of a study, one JSON file each."""

    def __init__(self, out: Path, minutes: float):
        self.out, self.end = out, time.monotonic() + 60 * minutes

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        file = self.out / f"{name}.json"
        if not file.is_file():
            if time.monotonic() > self.end:
                return None
            start = time.perf_counter()
            body = make()
            file.write_text(json.dumps({"seconds": time.perf_counter() - start, "figures": body}))
        return json.loads(file.read_text())["figures"]


def spread(values: Sequence[float], digits: int = 1) -> str:
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def study_curves(given: argparse.Namespace, notes: Notes) -> dict[str, Any]:
    network, found = lenet(given.out), {}
    groups = [group.name for group in network.channels.free]

    def make(criterion: str, seed: int) -> dict[str, Any]:
        scores, chosen = network.scores(criterion, seed), method(criterion)
        orders = chosen.orders(scores, network.channels, SelectionRequest())
        return {name: {"order": list(order), "top1": curve(network, name, order)} for name, order in orders.items()}

    for seed, criterion in itertools.product(given.seeds, given.criteria):
        body = notes.get(f"curves_{criterion}_{seed}", lambda c=criterion, s=seed: make(c, s))
        if body is not None:
            found.setdefault(criterion, []).append(body)
    print(
        f"LeNet6-16, dense {network.top1(network.model):.2f} %. Mean top-1 over all counts of a layer, not finetuned:\n"
    )
    print(f"| criterion | {' | '.join(groups)} | same order between seeds |\n|{'---|' * (len(groups) + 2)}")
    for criterion, bodies in found.items():
        cells = [spread([statistics.mean(body[name]["top1"]) for body in bodies]) for name in groups]
        same = [
            float(spearmanr(np.argsort(a[name]["order"]), np.argsort(b[name]["order"])).statistic)
            for a, b in itertools.combinations(bodies, 2)
            for name in groups
        ]
        print(f"| {criterion} | {' | '.join(cells)} | {f'{statistics.mean(same):.2f}' if same else ''} |")
    return found


def study_budgets(given: argparse.Namespace, notes: Notes) -> dict[str, Any]:
    network, found = lenet(given.out), {}

    def make(criterion: str, share: float, seed: int) -> list[float]:
        chosen = method(criterion)
        plan = chosen.select(
            network.scores(criterion, seed), network.channels, SelectionRequest(target=("params", share))
        )
        small = copy.deepcopy(network.model)
        surgeon.apply_plan(small, network.channels, plan)
        before = network.top1(small.eval())
        network.fit(small.train(), _settings(given.epochs, 64), seed)
        return [before, network.top1(small)]

    for criterion, share, seed in itertools.product(given.criteria, BUDGETS, given.seeds):
        name = f"budget_{criterion}_{share}_{seed}_{given.epochs}"
        body = notes.get(name, lambda c=criterion, s=share, n=seed: make(c, s, n))
        if body is not None:
            found.setdefault(criterion, {}).setdefault(str(share), []).append(body)
    print(f"LeNet6-16, all layers alike; top-1 after cutting -> after {given.epochs} epoch(s):\n")
    print(f"| criterion | {' | '.join(f'{s} of the parameters' for s in BUDGETS)} |\n|{'---|' * (len(BUDGETS) + 1)}")
    for criterion, shares in found.items():
        cells = [
            " -> ".join(spread([pair[i] for pair in shares[str(s)]]) for i in (0, 1)) if str(s) in shares else ""
            for s in BUDGETS
        ]
        print(f"| {criterion} | {' | '.join(cells)} |")
    return found


def study_resnet(given: argparse.Namespace, notes: Notes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for depth in given.depth:
        network = resnet(depth)
        dense = notes.get(f"resnet{depth}_dense_{given.tested}", lambda n=network: n.top1(n.model, given.tested))

        def make(criterion: str, seed: int, network: Network = network) -> float:
            scores = network.scores(criterion, seed)
            plan = method(criterion).select(scores, network.channels, SelectionRequest(keep_ratio=0.5))
            small = copy.deepcopy(network.model)
            surgeon.apply_plan(small, network.channels, plan)
            return network.top1(small.eval(), given.tested)

        print(f"ResNet-{depth}, dense {dense} % on the first {given.tested} test images:\n")
        print("| criterion | top-1, half of the inner filters |\n|---|---|")
        for criterion, seed in itertools.product([c for c in given.criteria if c != "binning"], given.seeds):
            name = f"resnet{depth}_{criterion}_{seed}_{given.tested}"
            body = notes.get(name, lambda c=criterion, s=seed: make(c, s))
            if body is not None:
                found.setdefault(f"resnet{depth}", {}).setdefault(criterion, []).append(body)
        for criterion, tops in found.get(f"resnet{depth}", {}).items():
            print(f"| {criterion} ({len(tops)}) | {spread(tops, 2)} |")
    return found


STUDIES = {"curves": study_curves, "budgets": study_budgets, "resnet": study_resnet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True, help="folder of finished pieces")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration images")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56], choices=(20, 32, 44, 56))
    parser.add_argument("--epochs", type=int, default=1, help="budgets: of finetuning")
    parser.add_argument("--tested", type=int, default=2000, help="resnet: so many first test images")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing new after so long")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    body = STUDIES[given.study](given, Notes(given.out, given.minutes))
    told = {
        "machine": describe_environment(DistributedEnvironment.single_process()),
        "commit": commit_of(Path(__file__)),
        "seeds": given.seeds,
    }
    (given.out / f"{given.study}.json").write_text(json.dumps({**told, "figures": body}, indent=1))


if __name__ == "__main__":
    main()
