"""Criteria on the CIFAR-10 ResNet-56, scored in one pass: what they keep, what they cost, accuracy before finetuning.

    python benchmarks/criteria.py [--methods a,b,c] [--images 200] [--micro 50] [--test 2000] [--macs 0.7]

Needs $DIST_PRUNE_DATA. Prints a Markdown table: top-1 on the first test images after surgery, nothing finetuned, and
the kept channels that two criteria have in common.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.pipeline.git import commit_of
from dist_prune.run import run

WEIGHTS = ("l1", "fpgm", "whc", "bn_scale", "group_norm", "random")
DATA = ("apoz", "hrank", "chip", "taylor", "obd", "group_fisher", "hessian_trace")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default=",".join((*WEIGHTS, *DATA)))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--micro", type=int, default=50)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--scope", default="local")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = np.load(Path(os.environ["DIST_PRUNE_DATA"], "cifar10.npz"))
        shown = {"train": 5000, "test": given.test}
        np.savez(
            folder / "few.npz", **{f"{x}_{part}": whole[f"{x}_{part}"][:n] for part, n in shown.items() for x in "xy"}
        )
        words = [
            f"data.root={folder / 'few.npz'}", f"score.images={given.images}", f"score.micro_batch={given.micro}",
            f"score.compare=[{given.methods}]",
            f"target.macs={given.macs}", f"select.scope={given.scope}", "select.max_ratio=0.9", "report.trackers=[]",
        ]  # fmt: skip
        machine = DistributedEnvironment.single_process()
        start = time.perf_counter()
        run(loading.load("resnet56_cifar10_l1", words, methods.options_of), folder / "run", machine, until="many")
        seconds = time.perf_counter() - start
        table = json.loads((folder / "run/criteria.json").read_text())["table"]
    facts = describe_environment(machine)
    print(f"\n{facts['processor']}, {facts['threads']} thread(s), torch {facts['packages']['torch']}, seed 0, commit "
          f"{commit_of(Path(__file__))}; {seconds:.0f} s in all\n")  # fmt: skip
    names = [row["method"] for row in table]
    print(f"| criterion | top-1 % | MACs | params | {' | '.join(names)} |")
    print("|---" * (4 + len(names)) + "|")
    for row in table:
        shared = " | ".join(f"{row['overlap'][name]:.2f}" for name in names)
        print(f"| {row['method']} | {row['top1']:.2f} | {row['macs']:.3f} | {row['params']:.3f} | {shared} |")


if __name__ == "__main__":
    main()
