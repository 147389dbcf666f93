"""Start-up of the verbs of dist-prune: each in a fresh process, several rounds in turns, medians.

    python benchmarks/startup.py [--rounds 5] [--only "check ResNet-50,timm"]

The imports of torch, torchvision and timm alone stand beside them: they are the part that the verbs cannot change. The
recipe of ResNet-50 is checked with --assume, so no images are needed. Seconds of a processor depend less on other
programs than seconds of wall clock.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_prune.pipeline.git import commit_of

ROOT = Path(__file__).resolve().parents[1]
VERB = ("-m", "dist_prune.cli")
ROWS = {  # what -> words after python, bound in seconds or None
    "python": (("-c", "pass"), None),
    "import torch": (("-c", "import torch"), None),
    "import torchvision": (("-c", "import torchvision"), None),
    "import timm": (("-c", "import timm"), None),
    "--help": ((*VERB, "--help"), 0.3),
    "list methods": ((*VERB, "list", "methods"), 0.3),
    "list recipes": ((*VERB, "list", "recipes"), 0.3),
    "where quickstart": ((*VERB, "where", "--recipe", "quickstart"), 0.3),
    "sweep graph_cifar10": ((*VERB, "sweep", "graph_cifar10"), 0.3),
    "ps": ((*VERB, "ps", "recipes"), 0.3),
    "completion bash": ((*VERB, "completion", "bash"), None),
    "check quickstart": ((*VERB, "check", "quickstart"), None),
    "check ResNet-50": ((*VERB, "check", "--assume", "resnet50_graph"), 3.0),
}


def measure(words: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of wall clock and of a processor of one process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print a row for each verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="a further round before them does not count")
    parser.add_argument("--only", default="", help="rows whose names contain one of these, comma-separated")
    given = parser.parse_args()
    asked = [part.strip() for part in given.only.split(",")]
    rows = {name: row for name, row in ROWS.items() if any(part in name for part in asked)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for number in range(given.rounds + 1):
        for name, (words, _) in rows.items():
            seconds = measure(words)
            times[name] += [seconds] if number else []
    print("| command | wall clock, s | slowest | of a processor, s | bound |\n|---|---|---|---|---|")
    for name, (_, bound) in rows.items():
        wall, busy = zip(*times[name], strict=True)
        print(
            f"| {name} | {statistics.median(wall):.2f} | {max(wall):.2f} | {statistics.median(busy):.2f} | "
            f"{'' if bound is None else f'under {bound:g}'} |"
        )
    commit, cores = (commit_of(Path(__file__)) or "unknown")[:7], len(os.sched_getaffinity(0))
    print(f"\nMedian of {given.rounds}, commit {commit}, {cores} core(s), Python {platform.python_version()}")


if __name__ == "__main__":
    main()
