"""The time of each stage of one recipe in two checkouts of this project, in turns: what a change costs a run.

    python benchmarks/stages.py BEFORE AFTER [--recipe quickstart] [--pairs 7] [--stages train score evaluate]
        [KEY=VALUE ...]

BEFORE and AFTER are folders of checkouts (`git worktree add FOLDER COMMIT`); runs go to a temporary folder. One thread,
one process. Printed are the medians of the seconds that the ledgers note, and the median and range of the ratios
after / before, pair by pair. Without KEY=VALUE: ResNet-20 on 2,560 real CIFAR-10 images, one epoch, taylor on 500,
which needs $DIST_PRUNE_DATA.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = (
    "backbone={name: resnet20_cifar}", "data={source: npz, root: '${DIST_PRUNE_DATA}/cifar10.npz'}",
    "method.name=taylor", "train.epochs=1", "train.images=2560", "finetune.epochs=0", "score.images=500",
    "report.latency_batches=[1]", "report.latency_repeats=2", "target.tolerance=null",
)  # fmt: skip


def seconds(checkout: Path, recipe: str, words: list[str]) -> dict[str, float]:
    """Run a recipe in a checkout; label of a stage -> seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(checkout / "dist_prune/run.py"),
            "--recipe",
            recipe,
            "--run-dir",
            f"{folder}/run",
        ]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *words], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 3):
            sys.exit(f"{checkout}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = map(json.loads, Path(f"{folder}/run/ledger.jsonl").read_text().splitlines())
        return {line["stage"]: line["seconds"] for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--stages", nargs="+", default=["train", "score", "evaluate"])
    given, words = parser.parse_known_args()
    if odd := [word for word in words if "=" not in word or word.startswith("-")]:
        parser.error(f"not known: {' '.join(odd)}; overrides have the form KEY=VALUE")
    found: dict[str, list[tuple[float, float]]] = {stage: [] for stage in given.stages}
    for number in range(given.pairs + 1):
        order = (given.before, given.after) if number % 2 else (given.after, given.before)
        took = {place: seconds(place.resolve(), given.recipe, words or list(WORDS)) for place in order}
        for stage, pairs in found.items() if number else ():  # the first pair warms up
            pairs.append((took[given.before][stage], took[given.after][stage]))
    for stage, pairs in found.items():
        ratios = [after / before for before, after in pairs]
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(
            f"{stage}: {before:.2f} s before, {after:.2f} s after, {statistics.median(ratios):.3f}x "
            f"({min(ratios):.3f} to {max(ratios):.3f}, {len(pairs)} pairs)"
        )


if __name__ == "__main__":
    main()
