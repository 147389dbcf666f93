"""Attacks on the product, and how many ended as they should: in the right answer, or in a sentence.

    python benchmarks/attacks.py [--seed N] [--count KIND=N ...] [--kind KIND ...]

A kind is a module of tests/fuzz with ``cases(seed, count)``; it yields (label, what to call), which raises
AssertionError where the outcome is wrong. Exit code 1 where one was.
"""

import argparse
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import fuzz

COUNT, COUNTS = 500, {"kills": 8}  # cases per kind; whole runs take seconds each, not milliseconds


def kinds() -> list[str]:
    """Modules of tests/fuzz that have cases."""
    found = sorted(module.name for module in pkgutil.iter_modules(fuzz.__path__))
    return [name for name in found if hasattr(importlib.import_module(f"tests.fuzz.{name}"), "cases")]


def attack(cases: Iterable[tuple[str, Callable[[], object]]]) -> tuple[int, list[str], float]:
    """(how many were tried, what ended otherwise, seconds of the slowest)."""
    tried, wrong, slowest = 0, [], 0.0
    for label, act in cases:
        start = time.perf_counter()
        try:
            act()
        except Exception as error:  # AssertionError, or whatever an attack got through with
            wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
        tried, slowest = tried + 1, max(slowest, time.perf_counter() - start)
    return tried, wrong, slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=kinds(), help="only these")
    parser.add_argument("--count", action="append", default=[], metavar="KIND=N", help="cases of a kind")
    given = parser.parse_args()
    counts = COUNTS | {name: int(number) for name, number in (word.split("=", 1) for word in given.count)}
    tried = right = 0
    print(f"{'kind':16} {'tried':>6} {'right':>6} {'seconds':>8} {'slowest':>8}")
    for name in given.kind or kinds():
        start = time.perf_counter()
        module = importlib.import_module(f"tests.fuzz.{name}")
        count, wrong, slowest = attack(module.cases(given.seed, counts.get(name, COUNT)))
        took = time.perf_counter() - start
        print(f"{name:16} {count:6} {count - len(wrong):6} {took:8.1f} {slowest:8.2f}", flush=True)
        for line in wrong:
            print(f"  WRONG {line}", flush=True)
        tried, right = tried + count, right + count - len(wrong)
    print(f"{'all':16} {tried:6} {right:6}   ended in the right answer or in a sentence")
    return int(right < tried)


if __name__ == "__main__":
    sys.exit(main())
