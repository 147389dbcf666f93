"""Ratios found by a search against uniform and global ones: top-1 after recalibrated batch norms, without finetuning.

    python benchmarks/search.py OUT [--networks resnet20,mobilenetv2] [--targets 0.5,0.9] [--candidates 200,32]
        [--method taylor] [--table]
    torchrun --nproc_per_node 2 benchmarks/search.py OUT --time resnet20 [--candidates 200]

Needs $DIST_PRUNE_DATA. OUT gets what was judged and one JSON file for each network; work that is there is not done
again. One search serves all targets. Judging images, images of the repair and images that calibrate the scores are
apart; the test images judge nothing and give the figures of the table. CIFAR-10 networks take 2,000 training images to
judge, 200 to repair, 1,000 to score, and all test images. MobileNetV2 has 1,000 images in all: 300 judge, 100 repair
and score, 600 test. Its weights come with folded batch norms; they get the statistics of the dense network back first
(the same function), because a recalibration needs some.

--time searches with 0.5 of the MACs alone and prints the seconds of this number of ranks.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dist_prune as dp
from dist_prune import methods, models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.fileio import write_atomic
from dist_prune.models.torchvision_weights import translate_names
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.first_candidates import ratio_search
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.selection.ratio_search import Counts, RatioSearch, best_of
from dist_prune.scoring.candidate_judge import CandidateJudge
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.training.tracking import Tracker

CPU, SEED, COST = torch.device("cpu"), 0, "macs"
Parts = dict[str, np.ndarray]  # judge, repair, score, test -> ids


def network(name: str) -> tuple[nn.Module, ImageLoader, ImageLoader, Parts]:
    """A dense network, the loaders of its training and test images, and who sees which of them."""
    place = Path(os.environ["DIST_PRUNE_DATA"])
    rng = np.random.default_rng(SEED)
    if name == "mobilenetv2":
        model, file, half = models.create("mobilenetv2_100", 1000, 3), "mobilenetv2_imagenet_rot180", (0.5, 0.5, 0.5)
        source = open_source("imagefolder", str(place / "imagenet_1000_rot180"), "val", False)
        train = test = ImageLoader(source, TransformConfig(224, half, half, 0.875), CPU)
        order = rng.permutation(len(train))
        parts = {"judge": order[:300], "repair": order[300:400], "score": order[300:400], "test": order[400:]}
    else:
        model, file = models.create(f"{name}_cifar", 10, 3), f"{name}_cifar10"
        look = TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        path = str(place / "cifar10.npz")
        train, test = (ImageLoader(open_source("npz", path, "", split), look, CPU) for split in (True, False))
        order = rng.permutation(len(train))
        parts = {"judge": order[:2000], "repair": order[2000:2200], "score": order[2200:3200]}
        parts["test"] = np.arange(len(test))
    weights = tensor_files.read_weights(place / "weights" / f"{file}.safetensors")
    tensor_files.load_strictly(model, translate_names(weights, model.state_dict()), file)
    parts = {key: np.sort(ids) for key, ids in parts.items()}
    if name == "mobilenetv2":
        unfold(model.eval(), train, parts["repair"])
    return model.eval(), train, test, parts


@torch.no_grad()
def unfold(model: nn.Module, loader: ImageLoader, ids: np.ndarray) -> None:
    """Give batch norms the statistics of their inputs, and weights with which they compute the same as before.

    The statistics are those of the network as it is: a recalibration normalises by them on its way and would measure
    another network.
    """
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    sums = {name: torch.zeros(3, norm.num_features, dtype=torch.float64) for name, norm in norms.items()}

    def add(name: str, x: torch.Tensor) -> None:
        x = x.double()
        sums[name] += torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3)), torch.ones_like(x[0, :, 0, 0])])
        sums[name][2] += x.numel() // x.shape[1] - 1

    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, norm in norms.items()
    ]
    for images, _ in batches(loader, ids, 25):
        model(images)
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        mean, square = (sums[name][:2] / sums[name][2]).float()
        var = square - mean * mean
        old = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        norm.bias.add_(old * (mean - norm.running_mean))  # type: ignore[operator]
        norm.weight.copy_(old * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)  # type: ignore[union-attr,operator]
        norm.running_var.copy_(var)  # type: ignore[union-attr,operator]


def batches(loader: ImageLoader, ids: np.ndarray, size: int = 50) -> list[tuple[torch.Tensor, torch.Tensor]]:
    lists = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [(batch.images, batch.labels) for batch in loader.batches(lists)]


def judge_of(
    model: nn.Module, graph: DependencyGraph, orders: dict[str, list[int]], loader: ImageLoader, judged: np.ndarray,
    repaired: np.ndarray, file: Path | None, identity: str, comm: Communicator,
) -> CandidateJudge:  # fmt: skip
    """What judges networks by their counts, on some images."""

    def plan_of(counts: Counts) -> Plan:
        kept = {g.name: sorted(orders[g.name][g.width - n :]) for g, n in zip(graph.free, counts, strict=True)}
        return Plan.from_kept(graph, kept)

    micro = 100 if loader.transform.size <= 32 else 25
    tracker = Tracker(comm.is_main)
    return CandidateJudge(
        model, graph, plan_of, loader, judged, repaired, micro, comm, tracker, CLASSIFICATION, file, identity
    )


def prepare(
    name: str, targets: list[float], candidates: int, method: str
) -> tuple[nn.Module, ImageLoader, ImageLoader, Parts, dict[str, list[int]], RatioSearch]:
    """Load and score a network: it, its images, the order of its channels, and the search's rules."""
    model, train, test, parts = network(name)
    loader = batches(train, parts["score"])
    graph = dp.trace(model, tuple(loader[0][0].shape[1:]))
    scores = dp.score(model, graph, method, loader, micro_batch=25)
    kind: Any = methods.find(method)
    paper = kind(kind.Options())
    request = SelectionRequest(target=(COST, targets[0]), round_to=1, seed=SEED)
    graph = paper.prepare(paper.prunable(graph), (), request)
    search = ratio_search(graph, paper.importance(scores, graph), request, tuple(targets), candidates)
    return model, train, test, parts, dict(paper.orders(scores, graph, request)), search


def measure(name: str, targets: list[float], candidates: int, method: str, out: Path, comm: Communicator) -> None:
    """Search for one network's targets and write OUT/NAME.json."""
    model, train, test, parts, orders, search = prepare(name, targets, candidates, method)
    graph = search.graph
    identity = f"{name} {method} {SEED}"
    judge = judge_of(
        model, graph, orders, train, parts["judge"], parts["repair"], out / f"{name}.jsonl", identity, comm
    )
    start, processor = time.monotonic(), time.process_time()
    made, judged = judge.search(search)
    seconds, processor = time.monotonic() - start, time.process_time() - processor
    if comm.is_main:
        print(f"{name}: {len(made)} candidates on {comm.world} rank(s) in {seconds:.1f} s", flush=True)
    figures = {c.number: judge.rank(judged[c.number]) for c in made}
    # the test images, repaired on the same images; on this loader training ids mean other images
    tester = judge_of(model, graph, orders, _joined(train, test), parts["test"] + len(train), parts["repair"],
                      out / f"{name}_test.jsonl", identity, comm)  # fmt: skip
    rows = []
    for target in targets:
        best = best_of([c for c in made if c.target == target], figures)[0]
        plans = {c.origin: c for c in made[: 4 * len(targets)] if c.target == target} | {"search": best}
        for rule, candidate in plans.items():
            (found,) = tester.judge([candidate.counts], 0, 1)
            rows.append({
                "target": target, "rule": rule, "share": search.share(candidate.counts), "heldout": judged[
                candidate.number].figure, "test": found.figure, "number": candidate.number, "origin": candidate.origin,
            })  # fmt: skip
    body = {"network": name, "method": method, "seed": SEED, "candidates": len(made), "ranks": comm.world,
            "judging": len(parts["judge"]), "test": len(parts["test"]), "seconds": round(seconds, 1),
            "processor_seconds": round(processor, 1), "rows": rows}  # fmt: skip
    if comm.is_main:
        write_atomic(out / f"{name}.json", json.dumps(body, indent=1))


def _joined(train: ImageLoader, test: ImageLoader) -> ImageLoader:
    """A loader whose ids from the number of training images on are test images."""

    class Joined:
        transform, device, dtype, source = train.transform, train.device, train.dtype, train.source
        image_shape = train.image_shape

        def holding(self) -> "Joined":
            return self

        def __len__(self) -> int:
            return len(train) + len(test)

        def batches(self, lists: Any):
            for ids in lists:
                tested = ids[0] >= len(train)
                yield from (test.batches([ids - len(train)]) if tested else train.batches([ids]))

    return Joined()  # type: ignore[return-value]


def table(out: Path) -> None:
    """Print what was measured."""
    for file in sorted(out.glob("*.json")):
        body = json.loads(file.read_text())
        print(f"\n{body['network']}: {body['candidates']} candidates, {body['method']}, {body['judging']} judging and "
              f"{body['test']} test images, {body['seconds']} s on {body['ranks']} rank(s)")  # fmt: skip
        print("| MACs | rule | MACs left | top-1 %, judging | top-1 %, test |\n|---|---|---|---|---|")
        for row in body["rows"]:
            rule = row["rule"] if row["rule"] != "search" else f"search (number {row['number']}, {row['origin']})"
            print(f"| {row['target']} | {rule} | {row['share']:.4f} | {row['heldout']:.2f} | {row['test']:.2f} |")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--networks", default="resnet20,mobilenetv2")
    parser.add_argument("--targets", default="0.5,0.9")
    parser.add_argument("--candidates", default="200,32")
    parser.add_argument("--method", default="taylor")
    parser.add_argument("--time", default="", metavar="NETWORK")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.table:
        return table(arguments.out)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    comm, counts = Communicator.of(), [int(count) for count in arguments.candidates.split(",")]
    if arguments.time:
        return time_ranks(arguments.time, counts[0], arguments.method, comm)
    for name, candidates in zip(arguments.networks.split(","), counts, strict=False):
        if not (arguments.out / f"{name}.json").exists():
            targets = [float(share) for share in arguments.targets.split(",")]
            measure(name, targets, candidates, arguments.method, arguments.out, comm)
    table(arguments.out)


def time_ranks(name: str, candidates: int, method: str, comm: Communicator) -> None:
    """Print the seconds of a search that saves nothing."""
    model, train, _, parts, orders, search = prepare(name, [0.5], candidates, method)
    judge = judge_of(model, search.graph, orders, train, parts["judge"], parts["repair"], None, "", comm)
    comm.barrier()
    start = time.monotonic()
    made, judged = judge.search(search)
    seconds = time.monotonic() - start
    best = best_of(made, {number: judge.rank(one) for number, one in judged.items()})[0]
    if comm.is_main:
        print(f"{name}: {len(made)} candidates on {comm.world} rank(s) of {torch.get_num_threads()} thread(s): "
              f"{seconds:.1f} s; winner {best.number} ({best.origin}), {judged[best.number].figure:.2f} %")  # fmt: skip


if __name__ == "__main__":
    main()
