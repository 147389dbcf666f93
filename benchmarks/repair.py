"""Top-1 after surgery, repaired and not, without finetuning: criteria, methods of repair and numbers of images.

    python benchmarks/repair.py OUT [--cases mobilenetv2-inner:0.9 vit:0.7] [--criteria l1 taylor reconstruction random]
        [--repairs none norms bias fold least_squares] [--images 256 64 500] [--judge 2000] [--minutes 60]
    python benchmarks/repair.py OUT --speed [--cases mobilenetv2-inner:0.9] [--images 256]
    python benchmarks/repair.py OUT --shift [--cases resnet20:0.5 resnet56:0.5] [--images 256]
    python benchmarks/repair.py OUT --table [--results FILE]
    python benchmarks/repair.py OUT --collect benchmarks/results/repair.json

Needs $DIST_PRUNE_DATA. A case is NETWORK[-inner][-global]:MACS. ``-inner`` cuts the channels inside of blocks alone
(the expansions of MobileNetV2, the MLPs of the ViT); without it all groups are cut. ``-global`` ranks the channels of
all these groups together; without it each group loses the same share. The ViT is trained on CIFAR-10 by the recipe
vit_cifar10_repair, in OUT/vit, if it is not there.

``--speed`` repairs on one rank and then on two, one thread each, and prints seconds, memory and the speedup.
``--shift`` measures why shifted means alone (``bias``) do not repair networks with batch norms.

OUT gets one JSON file for each cell, and cells that are there are not computed again, so the same command resumes.
Images that calibrate never judge: 500 of the 1,000 ImageNet images calibrate MobileNetV2 and the other 500 judge;
CIFAR-10 networks are calibrated on training images and judged on the first test images.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import dist_prune as dp
from benchmarks.repair_parts import shift, speed, subjects, tables
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.fileio import write_atomic
from dist_prune.pipeline.git import commit_of

CASES = [
    "mobilenetv2-inner:0.9", "mobilenetv2-inner:0.7", "mobilenetv2-inner-global:0.9", "mobilenetv2-inner-global:0.7",
    "vit:0.7", "vit-inner:0.7", "resnet56:0.5", "resnet20:0.5", "resnet56-global:0.5", "resnet20-global:0.5",
    "mobilenetv2:0.9", "mobilenetv2:0.7",
]  # fmt: skip


def measure(subject: subjects.Subject, cell: dict[str, Any], given: argparse.Namespace) -> None:
    """Score once, cut once, and repair in each way whose file is missing."""
    case, criterion, count = cell["case"], cell["criterion"], cell["images"]
    images = subject.first(count)
    network = subjects.parse(case)[0]
    scored = given.out / "scores" / f"{network}_{criterion}_{count}.safetensors"
    scores, scoring = subjects.scores(subject, scored, criterion, images)
    plan = dp.select(
        scores, subject.graph, target={"macs": cell["macs"]}, seed=subjects.SEED, **subjects.selection(case)
    )
    small = dp.prune(subject.model, plan)
    left = {name: value / dp.costs(subject.graph)[name] for name, value in dp.costs(subject.graph, plan).items()}
    for repair in given.repairs:
        file = place_of(given.out, cell | {"repair": repair})
        if file.exists():
            continue
        start, cpu = time.perf_counter(), time.process_time()
        repaired = small
        if repair != "none":
            repaired = dp.repair(subject.model, small, plan, [images], method=repair)
        facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        figures = {"dense": subject.dense, "top1": subject.top1(repaired), "judge": len(subject.judging[0])}
        figures |= {"macs_left": left["macs"], "params_left": left["params"], "score_cpu_seconds": scoring}
        write_atomic(file, json.dumps(cell | {"repair": repair} | facts | figures | {"about": about()}, indent=1))
        print(
            f"{case} {cell['macs']} {criterion} {count} {repair}: {figures['top1']:.2f} % of {subject.dense:.2f} %, "
            f"{facts['cpu_seconds']:.0f} s of the processor",
            flush=True,
        )


def about() -> dict[str, Any]:
    """The machine and the code."""
    found = describe_environment(DistributedEnvironment.start(1800, False, False))
    return {
        **{key: found[key] for key in ("processor", "cores", "threads", "python")},
        "torch": found["packages"]["torch"], "commit": commit_of(Path(__file__)), "seed": subjects.SEED,
    }  # fmt: skip


def place_of(folder: Path, cell: dict[str, Any]) -> Path:
    return folder / "_".join(str(cell[key]) for key in ("case", "macs", "criterion", "images", "repair")) / "cell.json"


def cells(given: argparse.Namespace) -> list[dict[str, Any]]:
    """In order of work: numbers of images, cases, criteria."""
    found = []
    for count in given.images:
        for item in given.cases:
            case, _, macs = item.partition(":")
            subjects.parse(case)
            for criterion in given.criteria:
                found.append({"case": case, "macs": float(macs), "criterion": criterion, "images": count})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--criteria", nargs="+", default=["reconstruction", "l1", "taylor", "random"])
    parser.add_argument("--repairs", nargs="+", default=["none", "least_squares", "norms", "bias", "fold"])
    parser.add_argument("--images", nargs="+", type=int, default=[256, 64, 500])
    parser.add_argument("--judge", type=int, default=2000, help="judging images, at most")
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell is begun after so many")
    parser.add_argument(
        "--speed", nargs="?", const="both", choices=["both", "rank"], help="time one case on 1 and 2 ranks"
    )
    parser.add_argument("--shift", action="store_true", help="the study of shifted means, by the criterion l1")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--collect", type=Path, metavar="FILE", help="add all figures to one compact file")
    parser.add_argument("--results", type=Path, metavar="FILE", help="--table: of this compact file")
    given = parser.parse_args()
    if given.collect:
        write_atomic(given.collect, tables.compact(tables.merged(given.collect, tables.read(given.out))))
    if given.table:
        print(tables.markdown(tables.load(given.results) if given.results else tables.read(given.out)))
    if given.table or given.collect:
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    given.out.mkdir(parents=True, exist_ok=True)
    if given.speed or given.shift:
        for item in given.cases:
            case, _, macs = item.partition(":")
            if given.shift:
                print(shift.study(given.out, case, float(macs), "l1", given.images[0], given.judge), flush=True)
            elif given.speed == "rank":
                speed.one(given.out, case, float(macs), given.images[0], given.repairs[0])
            else:
                method = "least_squares" if given.repairs[0] == "none" else given.repairs[0]
                print(speed.both(given.out, case, float(macs), given.images[0], method), flush=True)
                break
        return
    end, held = time.monotonic() + 60 * given.minutes, dict[str, subjects.Subject]()
    for cell in cells(given):
        if all(place_of(given.out, cell | {"repair": repair}).exists() for repair in given.repairs):
            continue
        if time.monotonic() > end:
            break
        network = subjects.parse(cell["case"])[0]
        if network not in held:
            held[network] = subjects.subject(network, given.out, given.judge)
        measure(held[network], cell, given)
    print(tables.markdown(tables.read(given.out)))


if __name__ == "__main__":
    main()
