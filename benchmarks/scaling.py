"""How scoring scales: rates measured here, one thread per rank, and a model of ImageNet on 8, 64 and 512 GPUs.

    DIST_PRUNE_DATA=... python benchmarks/scaling.py [--images 48] [--pairs 3] [--json FILE] [--rates FILE]
    DIST_PRUNE_DATA=... python benchmarks/scaling.py --volumes resnet20_cifar

Two tables are measured on this machine: what a rank costs, and the bytes that each rank hands to collectives for every
method and backbone (two real gloo ranks). The third is arithmetic (docs/scaling.md) on those rates and on ASSUMED,
which nobody measured here. ``--rates`` takes the measured rates from an earlier run's --json.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from dist_prune import methods, models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import micro_batches
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import shutdown
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.tracking import Tracker

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK = "resnet50.tv_in1k"
# backbone -> (side, source, folder of DIST_PRUNE_DATA, classes)
BACKBONES = {
    "resnet20_cifar": (32, "npz", "cifar10.npz", 10),
    "resnet56_cifar": (32, "npz", "cifar10.npz", 10),
    "mobilenetv2_100": (224, "imagefolder", "imagenet_1000", 1000),
    NETWORK: (224, "imagefolder", "imagenet_1000", 1000),
}
HEAVY = {"mint"}  # hours on the large networks: counted on the small one only


@dataclass(frozen=True)
class Assumed:
    """What was not measured here."""

    gpu_images_s: float = 2500.0  # bare forward pass of ResNet-50 at 224 on one GPU
    gpus_per_node: int = 8
    cores_per_gpu: int = 12  # that decode
    network_bytes_s: float = 25e9  # between two nodes, each way
    hop_s: float = 20e-6  # one message between two nodes
    files_bytes_s: float = 10e9  # that the shared file system gives to all nodes together
    image_bytes: float = 110e3  # of an ImageNet JPEG


@dataclass(frozen=True)
class Job:
    """The scoring that is modelled: all of ImageNet's training images."""

    images: int = 1_281_167
    micro_batch: int = 50
    save_every: int = 100


def data() -> Path:
    place = Path(os.environ.get("DIST_PRUNE_DATA", "/nowhere"))
    if not (place / "imagenet_1000").is_dir():
        sys.exit("DIST_PRUNE_DATA names no folder with imagenet_1000 and cifar10.npz: nothing can be measured")
    return place


def bench_of(name: str, images: int, machine: DistributedEnvironment, micro_batch: int) -> DistributedScoringContext:
    """A network with random weights on real images: neither bytes nor seconds depend on the weights."""
    torch.manual_seed(0)
    side, kind, place, classes = BACKBONES[name]
    model = models.create(name, classes, 3).eval()
    source = open_source(kind, str(data() / place), "val" if kind == "imagefolder" else "", kind == "npz")
    feed = ImageLoader(
        source, TransformConfig(side, MEAN, STD, 0.875 if side == 224 else 1.0), machine.device, 0
    )  # decoded right here
    channels = trace_groups(model, torch.randn(1, 3, side, side))
    return DistributedScoringContext(model, channels, feed, np.arange(images), machine, Tracker(False), micro_batch)


def rates(images: int, pairs: int) -> dict[str, float]:
    """Seconds and images/s of one rank with one thread; medians of ``pairs`` turns.

    Seconds are those of the CPU, so that other work on the machine counts little.
    """
    start = time.process_time()
    bench = bench_of(NETWORK, images, DistributedEnvironment.single_process(), 16)
    found: dict[str, list[float]] = {"trace_s": [time.process_time() - start]}
    graph = methods.find("graph")
    method = graph(graph.Options())
    lists = [bench.ids[part] for part in micro_batches(np.arange(images), 16)]
    batches = list(bench.loader.batches(lists))
    scores = {}

    def timed(name: str, act) -> None:
        begin = sum(os.times()[:4])  # this process's and its children's, user and system
        act()
        found.setdefault(name, []).append(sum(os.times()[:4]) - begin)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                bench.model(batch.images)

    def score(some: int) -> None:  # the images are decoded already, as a loader's workers do it
        nonlocal scores
        bench.loader.batches = lambda *_: iter(batches[:some])  # type: ignore[method-assign]
        bench.ids = np.arange(sum(map(len, lists[:some])))
        scores = method.score(bench)

    plain = bench.loader.batches
    for _ in range(pairs):
        timed("decode", lambda: [None for _ in plain(lists)])
        timed("forward", forward)
        timed("score", lambda: score(len(lists)))
        timed("less", lambda: score(1))
    channels = method.prunable(bench.graph)
    tables = {name: tensor for name, tensor in scores.items() if name.endswith("hamming")}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(pairs):
            timed("select_s", lambda: method.select(scores, channels, SelectionRequest(threshold=0.7)))
            timed("save_s", lambda: tensor_files.save_tensors(Path(folder) / "partial.safetensors", tables, {}))
    command = [sys.executable, "-c", "import dist_prune.run"]
    for _ in range(pairs):
        timed("import_s", lambda: subprocess.run(command, check=True))
    middle = {name: statistics.median(values) for name, values in found.items()}
    body = {f"{name}_images_s": images / middle.pop(name) for name in ("decode", "forward")}
    # two sizes tell what an image costs from what the tables cost once
    whole, less, first = middle.pop("score"), middle.pop("less"), len(lists[0])
    body["score_images_s"] = (images - first) / (whole - less)
    tables_s = max(0.0, less - first / body["score_images_s"])
    return {**body, **middle, "tables_s": tables_s, "overhead": body["forward_images_s"] / body["score_images_s"]}


def talk() -> dict[str, float]:
    """Two gloo ranks on this machine: seconds of a merge of ResNet-50's table and of one small agreement."""
    return json.loads(_two("talk"))


def volumes(images: int, names: Sequence[str] = BACKBONES) -> dict[str, dict]:
    """For each method and backbone, what a rank of two hands to its collectives while it scores."""
    found = {}
    for name in names:
        for method, words in json.loads(_two("volume", name, str(images))).items():
            found[f"{method} on {name}"] = words
    return found


def _two(*words: str) -> str:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "--worker",
        *words,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def worker(words: list[str]) -> None:
    """One measurement among two ranks; the first prints it."""
    torch.set_num_threads(1)
    machine = DistributedEnvironment.start()
    ranks = machine.comm
    if words[0] == "volume":
        body: dict = {}
        for method in methods.list_names():
            if method in HEAVY and words[1] != "resnet20_cifar":
                continue
            kind, before = methods.find(method), dict(ranks.volume)
            kind(kind.Options()).score(bench_of(words[1], int(words[2]), machine, 5))
            body[method] = ranks.traffic_since(before)
    else:
        channels = trace_groups(models.create(NETWORK, 1000, 3).eval(), torch.randn(1, 3, 224, 224))
        tables = [torch.zeros((s.width, s.width), dtype=torch.int64) for s in channels.hook_points if s.kind == "conv"]
        merges, polls = [], []
        for _ in range(7):
            ranks.barrier()
            begin = time.perf_counter()
            ranks.all_reduce("sum", tables)
            merges.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            for _ in range(50):
                ranks.max_ints(0)
            polls.append((time.perf_counter() - begin) / 50)
        size = sum(table.numel() * 8 for table in tables)
        body = {"bytes": size, "merge_s": statistics.median(merges[1:]), "poll_s": statistics.median(polls[1:])}
    if ranks.is_main:
        print(json.dumps(body), flush=True)
    shutdown(ranks)


def modelled(gpus: int, rate: dict[str, float], assumed: Assumed, job: Job) -> dict[str, float]:
    """Seconds of scoring on ``gpus`` ranks, part by part (docs/scaling.md has the formulas)."""
    lists = math.ceil(job.images / job.micro_batch)
    rounds = math.ceil(lists / gpus)
    compute = assumed.gpu_images_s / rate["overhead"]
    decode = assumed.cores_per_gpu * rate["decode_images_s"]
    nodes = math.ceil(gpus / assumed.gpus_per_node)
    hops = 2 * math.ceil(math.log2(nodes)) * assumed.hop_s if nodes > 1 else 0.0
    folds = rounds // job.save_every + 1
    merge = 2 * rate["bytes"] / assumed.network_bytes_s * (nodes - 1) / nodes + hops
    parts = {
        "GPU": rounds * job.micro_batch / compute,
        "decoding": rounds * job.micro_batch / decode,
        "files": job.images * assumed.image_bytes / assumed.files_bytes_s,
    }
    serial = sum(rate[name] for name in ("import_s", "trace_s", "tables_s", "select_s"))
    out = {**parts, "agree": rounds * hops, "merge": folds * merge, "save": folds * rate["save_s"], "serial": serial}
    # images are read, decoded and scored at the same time: the slowest of the three counts
    out["total"] = max(parts.values()) + sum(out[key] for key in ("agree", "merge", "save", "serial"))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rates", type=Path, help="an earlier --json: measure nothing, only model")
    parser.add_argument("--volumes", nargs="+", choices=BACKBONES, help="only the bytes, of these backbones")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.worker:
        worker(given.worker)
        return
    if given.volumes:
        told(volumes(20, given.volumes))
        return
    if given.rates:
        body = json.loads(given.rates.read_text())
    else:
        rate = {**rates(given.images, given.pairs), **talk()}
        body = {
            "machine": describe_environment(DistributedEnvironment.single_process()),
            "rates": rate,
            "volumes": volumes(20),
        }
    if given.json:
        given.json.write_text(json.dumps({**body, "assumed": asdict(Assumed())}, indent=1))
    show(body)


def told(found: dict[str, dict]) -> None:
    print("MEASURED, bytes that a rank of two hands over while scoring 20 images")
    for name, words in found.items():
        said = ", ".join(f"{word} {count['bytes']:,} in {count['calls']}" for word, count in sorted(words.items()))
        print(f"  {name:32} {said or 'nothing: no images are looked at'}")


def show(body: dict) -> None:
    rate, assumed, job = body["rates"], Assumed(), Job()
    print(f"MEASURED, {body['machine']['processor']}, 1 thread per rank, {NETWORK} at 224")
    for key, value in rate.items():
        print(f"  {key:20} {value:14,.4f}")
    told(body["volumes"])
    print(f"ASSUMED {asdict(assumed)}")
    print(f"MODELLED, graph scoring of {job.images:,} images, seconds")
    rows = {gpus: modelled(gpus, rate, assumed, job) for gpus in (1, 8, 64, 512)}
    print(f"  {'GPUs':>6}" + "".join(f"{name:>10}" for name in rows[1]) + f"{'speed-up':>10}")
    for gpus, row in rows.items():
        times = "".join(f"{seconds:10.2f}" for seconds in row.values())
        print(f"  {gpus:6}{times}{rows[1]['total'] / row['total']:10.1f}")


if __name__ == "__main__":
    main()
