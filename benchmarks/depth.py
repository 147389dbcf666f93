"""Depth against width at equal MACs, without finetuning: top-1 after the cut and after a repair, and measured time.

    python benchmarks/depth.py OUT [--cases resnet56:0.5 mobilenetv2:0.9 vit:0.7] [--criterion taylor] [--images 256]
        [--judge 2000] [--batches 1 16] [--repeats 30] [--again]

Needs $DIST_PRUNE_DATA. A case is NETWORK:MACS. ``width`` removes channels (select.depth=false), ``depth`` blocks alone
(only), ``both`` channels and blocks (true). Blocks come whole, so ``depth`` leaves at most the MACs asked for; the
column says how many. Times are medians of forward passes of all four networks in turns, one thread each; --again takes
those of cases that are there once more, on a quieter machine. The ViT is trained on CIFAR-10 by the recipe
vit_cifar10_repair, in OUT/vit, if it is not there.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import dist_prune as dp
from benchmarks.repair import about
from benchmarks.repair_parts import subjects
from dist_prune.fileio import write_atomic

KINDS: dict[str, Any] = {"width": False, "depth": "only", "both": True}
REPAIRS = ("norms", "least_squares")


def measure(case: str, given: argparse.Namespace, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The figures of one network at one size; of a ``known`` cell the times alone."""
    network, _, share = case.partition(":")
    subject = subjects.subject(network, given.out, given.judge)
    subject.graph = dp.trace(subject.model, tuple(subject.calibration[0].shape[1:]), depth=True)
    images = subject.first(given.images)
    scores = dp.score(subject.model, subject.graph, given.criterion, [images], micro_batch=16, seed=subjects.SEED)
    whole, models = dp.costs(subject.graph), {"dense": subject.model}
    rows: dict[str, Any] = known["rows"] if known else {}
    for kind, depth in KINDS.items():
        target = {"macs": float(share)}
        plan = dp.select(scores, subject.graph, target=target, seed=subjects.SEED, depth=depth)
        models[kind] = small = dp.prune(subject.model, plan)
        if known:
            continue
        left = dp.costs(subject.graph, plan)
        row = {"macs": left["macs"] / whole["macs"], "params": left["params"] / whole["params"]}
        row |= {"blocks": len(plan.blocks_removed), "of": len(subject.graph.blocks), "none": subject.top1(small)}
        for repair in REPAIRS:
            row[repair] = subject.top1(dp.repair(subject.model, small, plan, [images], method=repair))
        rows[kind] = row
        print(f"{case} {kind}: {row}", flush=True)
    shape = tuple(subject.calibration[0].shape[1:])
    for batch in given.batches:
        times = dp.latency(models, shape, batch=batch, repeats=given.repeats, threads=1)
        for kind, row in rows.items():
            row[f"speedup_{batch}"] = times["dense"]["ms"] / times[kind]["ms"]
            row[f"reliable_{batch}"] = times["dense"]["reliable"] and times[kind]["reliable"]
    if known:
        return known
    return {
        "case": case, "criterion": given.criterion, "images": given.images, "dense": subject.dense,
        "judge": len(subject.judging[0]), "rows": rows, "about": about(),
    }  # fmt: skip


def markdown(cells: list[dict[str, Any]], batches: list[int]) -> str:
    """A table of all cases."""
    head = ["network: share asked", "what goes", "MACs left", "params left", "blocks gone", "cut", "norms", "repaired"]
    head += [f"speed-up, batch {batch}" for batch in batches]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for cell in cells:
        for kind, row in cell["rows"].items():
            words = [
                f"{cell['case']} (dense {cell['dense']:.1f} %)",
                kind,
                f"{row['macs']:.1%}",
                f"{row['params']:.1%}",
            ]
            words += [f"{row['blocks']} of {row['of']}", *(f"{row[key]:.1f} %" for key in ("none", *REPAIRS))]
            for batch in batches:
                doubt = "" if row.get(f"reliable_{batch}") else " (not reliable)"
                words.append(f"{row[f'speedup_{batch}']:.2f}x{doubt}" if f"speedup_{batch}" in row else "not measured")
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", default=["resnet56:0.5", "mobilenetv2:0.9", "vit:0.7"])
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--judge", type=int, default=2000, help="judging images, at most")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--again", action="store_true", help="measure the times of cases that are there once more")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    cells = []
    for case in given.cases:
        subjects.parse(case.partition(":")[0])
        file = given.out / f"depth_{case.replace(':', '_')}_{given.criterion}.json"
        known = json.loads(file.read_text()) if file.exists() else None
        if known is None or given.again:
            write_atomic(file, json.dumps(measure(case, given, known), indent=1))
        cells.append(json.loads(file.read_text()))
    print(markdown(cells, given.batches))


if __name__ == "__main__":
    main()
