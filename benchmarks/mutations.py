"""Would the tests notice? Small faults planted in the arithmetic, one at a time, each beside the tests of its room.

    python benchmarks/mutations.py [--module training data pruning methods] [--sample 40] [--seed 0]
                                   [--json FILE] [--file GLOB ...]

A mutant changes one operator, comparison or constant of one function. It is killed if a test of its room fails; it
survives if all pass, and is listed. Each room's tests run once without a mutant first: they have to pass, and their
time sets the limit for a mutant; one that runs into it is counted apart. --sample draws so many of each room (0:
all). Each runs in a process forked from one that has imported torch, with the mutated source in place of the file's.
With --json the same command resumes: kills are remembered for as long as the file is what it was.
EQUIVALENT names mutants that change nothing that a caller can see, each with the reason; they do not count.
"""

import argparse
import ast
import contextlib
import copy
import fnmatch
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dist_prune"
SLOWER = 4  # than the tests without a mutant: what takes longer hangs

ALONE = ("-k", "not killed and not ranks and not resume and not world and not stopped")  # what needs no other process
# room -> (files that compute, test files that hold their values, the quick ones first, and how they are run)
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "training": (
        (
            "training/loss.py",
            "training/optim.py",
            "training/loop.py",
            "training/bn_recalibration.py",
            "training/engine.py",
            "training/evaluation.py",
        ),
        (
            "tests/training/test_arithmetic.py",
            "tests/training/test_evaluation.py",
            "tests/training/test_training.py",
            *ALONE,
        ),
    ),
    "data": (
        ("data/augment.py", "data/sampling.py", "data/loader.py", "data/memory_backend.py"),
        (
            "tests/data/test_sampling.py",
            "tests/training/test_arithmetic.py",
            "tests/data/test_augment.py",
            "tests/data/test_datasets.py",
        ),
    ),
    "pruning": (
        (
            "pruning/hooks/statistics.py",
            "pruning/selection/ranking.py",
            "pruning/selection/cost.py",
            "pruning/hooks/gating.py",
            "pruning/plan/plan.py",
            "pruning/selection/group_scores.py",
            "pruning/selection/schedule.py",
            "pruning/hooks/curvature.py",
        ),
        (
            "tests/pruning/hooks/test_statistics.py",
            "tests/pruning/selection/test_ranking.py",
            "tests/pruning/plan/test_plan.py",
            "tests/pruning/selection/test_constraints.py",
            "tests/pruning/hooks/test_gating.py",
            "tests/pruning/surgery/test_surgeon.py",
            "tests/pruning/selection/test_schedule.py",
            "tests/pruning/selection/test_cost.py",
            "tests/methods/test_criteria.py",
            "tests/test_golden.py",
            *ALONE,
        ),
    ),
    "methods": (
        (
            "methods/l1.py",
            "methods/l2.py",
            "methods/fpgm.py",
            "methods/whc.py",
            "methods/apoz.py",
            "methods/taylor.py",
            "methods/fisher.py",
            "methods/hrank.py",
            "methods/chip.py",
            "methods/graph/method.py",
            "methods/obd.py",
            "methods/group_norm.py",
            "methods/bn_scale.py",
            "methods/hrel.py",
        ),
        (
            "tests/methods/test_criteria.py",
            "tests/methods/test_fisher.py",
            "tests/methods/test_hrel.py",
            "tests/methods/test_graph.py",
            "tests/methods/test_graph_released.py",
            "tests/test_golden.py",
            *ALONE,
        ),
    ),
}
# (file, how the line begins, what) -> why nobody can tell
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "data/sampling.py",
        "start = seed * 0x9E37",
        "15111065706836454659 -> 15111065706836454660",
    ): "another constant of the mixing",
    (
        "data/memory_backend.py",
        "elif pixels.shape[-2:] != (size, size)",
        "2 -> 3",
    ): "resizing to the size that images have changes no pixel",
    (
        "data/loader.py",
        "for requested, (ids, pixels) in zip",
        "-> False",
    ): "a supplier that is right yields one batch for each list",
    ("data/loader.py", "yield Batch(", "-> False"): "when a copy ends, not what it holds",
    (
        "training/loop.py",
        "for images, labels, ids in zip(*tensors",
        "-> False",
    ): "three cuts of one length have as many pieces",
    ("training/bn_recalibration.py", "row, handles = [0], []", "0 -> 1"): "set before any forward pass",
    (
        "pruning/selection/ranking.py",
        "elif lacking < 0",
        "0 -> 1",
    ): "with as many as are wanted nothing is cut off either way",
    (
        "pruning/selection/cost.py",
        "if count < points[-1][0]",
        "Lt -> LtE",
    ): "the dense width's share is 1: nothing is saved",
    ("pruning/hooks/curvature.py", "return (2 * signs - 1).to(", "-> False"): "when a copy ends, not what it holds",
    (
        "methods/graph/method.py",
        "if best_share <= kept_share <= share",
        "LtE -> Lt",
    ): "of two thresholds with equal shares either keeps the same counts",
    ("methods/graph/method.py", "if height * width <= 64", "64 -> 65"): "two forms of one product; the faster is taken",
    ("methods/graph/method.py", "if height * width <= 64", "Mult -> Div"): "the same two forms",
    (
        "methods/group_norm.py",
        "weight = context.weight(HookPoint(",
        "-> True",
    ): "nobody asks a weight's site whether it leads",
}
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
          ast.Mod: ast.Mult, ast.Pow: ast.Mult}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """(what, line, number among the nodes) of everything that can be changed inside functions."""
    inside = {
        id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for s in f.body for node in ast.walk(s)
    }
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    said = {id(part) for n in ast.walk(tree) if isinstance(n, ast.Raise | ast.JoinedStr) for part in ast.walk(n)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) not in inside or id(node) in texts or id(node) in said:
            continue
        what = changed(copy.copy(node))
        if what:
            yield what, node.lineno, number  # type: ignore[attr-defined]


def changed(node: ast.AST) -> str:
    """Change a node in place; what was done, or nothing where it cannot be."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        before, node.ops = type(node.ops[0]), [COMPARE[type(node.ops[0])](), *node.ops[1:]]
        return f"{before.__name__} -> {type(node.ops[0]).__name__}"
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in BINARY:
        before, node.op = type(node.op), BINARY[type(node.op)]()
        return f"{before.__name__} -> {type(node.op).__name__}"
    if isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return f"-> {type(node.op).__name__}"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
        return f"-> {node.value}"
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        before, node.value = node.value, node.value + 1 if isinstance(node.value, int) else node.value * 0.9 + 0.01
        return f"{before} -> {node.value}"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        node.op = ast.UAdd()
        return "- dropped"
    return ""


def mutants(room: str, files: list[str]) -> list[dict[str, Any]]:
    """All mutants of a room's files."""
    found = []
    for name in ROOMS[room][0]:
        if files and not any(fnmatch.fnmatch(name, glob) for glob in files):
            continue
        if not (PACKAGE / name).is_file():
            sys.exit(f"{name} is gone: mend ROOMS in {__file__}")
        text = (PACKAGE / name).read_text()
        lines, mark = text.splitlines(), hashlib.sha256(text.encode()).hexdigest()[:12]
        for what, line, number in places(ast.parse(text)):
            said = lines[line - 1].strip()
            found.append({"room": room, "file": name, "line": line, "text": said, "what": what, "node": number,
                          "mark": mark})  # fmt: skip
    return found


class Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the package with one node of its source changed."""

    def __init__(self, mutant: dict[str, Any]):
        self.path = PACKAGE / mutant["file"]
        self.module = ".".join(("dist_prune", *Path(mutant["file"]).with_suffix("").parts))
        tree = ast.parse(self.path.read_text())
        changed(list(ast.walk(tree))[mutant["node"]])
        self.code = compile(ast.fix_missing_locations(tree), str(self.path), "exec")

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self.path))

    def exec_module(self, module: Any) -> None:
        module.__file__ = str(self.path)
        exec(self.code, module.__dict__)


def outcome(room: str, mutant: dict[str, Any] | None, limit: float) -> tuple[str, float]:
    """("passed", "failed" or "hangs", seconds) of the room's tests in a forked process, with a mutant or without."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if mutant is not None:
            sys.meta_path.insert(0, Planted(mutant))
        import pytest

        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests(room)])
        os._exit(0 if code == 0 else 1)
    start = time.monotonic()
    while time.monotonic() - start < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            found = "passed" if status == 0 else "failed"
            break
        time.sleep(0.05)
    else:
        found = "hangs"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started too
    if found == "hangs":
        os.waitpid(child, 0)
    return found, time.monotonic() - start


def equivalent(mutant: dict[str, Any]) -> str:
    """Why nobody can tell a mutant from what it was made of, or nothing."""
    for (file, begins, what), why in EQUIVALENT.items():
        if (mutant["file"], mutant["what"]) == (file, what) and mutant["text"].startswith(begins):
            return why
    return ""


def tests(room: str) -> list[str]:
    """What pytest is told: the room's test files, and how they are run."""
    words = list(ROOMS[room][1])
    gone = [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()]
    if gone:
        sys.exit(f"{', '.join(gone)}: gone; mend ROOMS in {__file__}")
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", nargs="*", default=[], help="only these files, as globs of paths below dist_prune/")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for name in ("torch", "numpy", "timm", "torch_pruning", "pytest", "accelerate", "sklearn.datasets", "pydantic"):
        importlib.import_module(name)  # once, before the forks
    killed = set(json.loads(given.json.read_text())) if given.json and given.json.is_file() else set()
    rows = []
    for room in given.module:
        plain, seconds = outcome(room, None, 3600)
        if plain != "passed":
            sys.exit(f"{room}: its tests fail without a mutant: python -m pytest {' '.join(tests(room))}")
        chosen = mutants(room, given.file)
        if given.sample and len(chosen) > given.sample:
            chosen = random.Random(given.seed).sample(chosen, given.sample)
        lived, hung, counted = 0, 0, 0
        for mutant in chosen:
            if equivalent(mutant):
                continue
            counted += 1
            key = f"{mutant['file']} {mutant['mark']} {mutant['node']}"
            if key in killed:
                continue
            found, _ = outcome(room, mutant, SLOWER * seconds + 30)
            if found == "failed":
                killed.add(key)
                if given.json:
                    given.json.write_text(json.dumps(sorted(killed), indent=1))
                continue
            lived, hung = lived + (found == "passed"), hung + (found == "hangs")
            word = "survived" if found == "passed" else "hangs"
            print(f"{word}: {mutant['file']}:{mutant['line']}: {mutant['what']} in {mutant['text']}", flush=True)
        rows.append((room, counted - lived - hung, hung, counted, len(chosen) - counted))
    print("\n| room | killed / all | hangs | share killed | equivalent, not counted |\n|---|---|---|---|---|")
    for room, dead, hung, counted, same in rows:
        print(f"| {room} | {dead} / {counted} | {hung} | {100 * dead / max(counted, 1):.0f} % | {same} |")


if __name__ == "__main__":
    main()
