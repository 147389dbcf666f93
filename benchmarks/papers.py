"""The rows of the papers' tables at the papers' own length: paper, ours, l1 and random from the same dense network.

    python benchmarks/papers.py [PAPER ...] [--row "lenet5_mnist:*" "*:random"] [--seeds 0 1 2] [--minutes 60]
        [--out runs/papers] [--set KEY=VALUE ...]
    python benchmarks/papers.py [PAPER ...] --list
    python benchmarks/papers.py --collect benchmarks/results/papers.json [--out runs/papers]
    python benchmarks/papers.py --table --results benchmarks/results/papers.json [--page FILE]

Needs $DIST_PRUNE_DATA. PAPER: dirichlet (with Shapley's values), entropy, graph or mint; default: all of them. A row is
CASE:NAME for one seed; --list prints all. Each is a run of dist_prune/run.py in OUT/CASE/seed_N/ROW. The dense network
is trained once for each case and seed, by the recipe, and every row starts at it. Finished rows are not run again. When
the minutes are over, the row under way is asked to stop and goes on with the next start of the same command. --set
shortens every run of OUT, to try the script; such rows are marked in the table. --page writes the tables as an HTML
page. --collect adds the figures to one compact file, of which `python -m tests.test_docs` makes the tables of
docs/papers.md.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.papers_parts import tables
from benchmarks.papers_parts.rows import CASES, Row, method
from dist_prune.fileio import write_atomic
from dist_prune.report.papers_html import render_papers

ROOT = Path(__file__).resolve().parents[1]
PAPERS = tuple(dict.fromkeys(case.paper for case in CASES.values()))
GRACE_S = 120  # for which a run may go on after it was asked to stop
NOT_TRAINED = ("train.epochs=0", "finetune.epochs=0")
STOPPED, NOT_REACHED = 75, 3  # exit codes of run.py: asked to stop; finished, but the target was not reached


class Rows:
    """The runs of one folder.

    Args:
        out: the folder.
        deadline: of ``time.monotonic()``; no run goes on after it.
        words: overrides of every run.
    """

    def __init__(self, out: Path, deadline: float, words: list[str]):
        self.out, self.deadline, self.words = out.resolve(), deadline, words
        kept = self.out / "set.json"
        if kept.is_file():
            self.words = json.loads(kept.read_text())
            if words and words != self.words:
                sys.exit(
                    f"--set: the runs in {out} were started with {' '.join(self.words) or 'none'}; take another OUT"
                )
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, json.dumps(words))

    def folder(self, case: str, seed: int, row: str) -> Path:
        """The run directory of a row."""
        return self.out / case / f"seed_{seed}" / re.sub(r"[^\w.]+", "_", row).strip("_")

    def run(self, case: str, seed: int, row: Row) -> bool:
        """Run a row, and before it what it starts from. False: there is no time left."""
        given = CASES[case]
        folder = self.folder(given.dense_of or case, seed, "dense")
        if not self._start(folder, given.recipe, seed, [*given.words, *_dense()]):
            return False
        words = [*given.words, *row.words]
        dense = folder / "dense.safetensors"
        words += ["train.epochs=0", f"backbone.checkpoint={dense}"]
        if row.like is not None:
            if not self._first(case, seed, row.like):
                return False
            words.append(f"target={{macs: {_macs_left(self.folder(case, seed, row.like)):.6f}}}")
        if row.bundle is not None:
            if not self._first(case, seed, row.bundle):
                return False
            words.append(f"select.plan={self.folder(case, seed, row.bundle) / 'export'}")
        if row.scores is not None:
            if not self._first(case, seed, row.scores):
                return False
            words.append(f"score.from={self.folder(case, seed, row.scores)}")
        return all(
            self._start(folder, row.recipe or given.recipe, seed, [*words, *more])
            for folder, more in self.runs(case, seed, row)
        )

    def runs(self, case: str, seed: int, row: Row) -> list[tuple[Path, list[str]]]:
        """The run directories of a row and their own overrides: one, or one for each of its grid."""
        folder = self.folder(case, seed, row.name)
        if not row.grid:
            return [(folder, [])]
        return [(folder / str(number), [word]) for number, word in enumerate(row.grid, start=1)]

    def overrides(self, words: list[str]) -> list[str]:
        """The overrides of a run with those of ``--set``, which shorten trainings and begin none."""
        return [*words, *self.words, *(word for word in words if word in NOT_TRAINED)]

    def _first(self, case: str, seed: int, name: str) -> bool:
        """Run the row that another one needs."""
        return self.run(case, seed, next(row for row in CASES[case].rows if row.name == name))

    def _start(self, folder: Path, recipe: str, seed: int, words: list[str]) -> bool:
        if (folder / "report.json").is_file():
            return True
        left = self.deadline - time.monotonic()
        if left <= 0:
            return False
        print(f"{folder.relative_to(self.out)}: {recipe} {' '.join(words)}", flush=True)
        command = [sys.executable, str(ROOT / "dist_prune/run.py"), "--recipe", recipe, "--run-dir", str(folder)]
        command += ["--seed", str(seed), *self.overrides(words)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGUSR1)
                code = process.wait(GRACE_S)
        if code == STOPPED:
            return False
        if code not in (0, NOT_REACHED):
            print(f"{folder}: exit code {code}, see {folder.with_suffix('.log')}", flush=True)
        return code in (0, NOT_REACHED)


def _dense() -> list[str]:
    """Overrides of the run that trains the dense network and does next to nothing else."""
    return [*method("random"), "select={}", "target={macs: 0.9}", "finetune.epochs=0", "score.images=100"]


def _macs_left(folder: Path) -> float:
    body = json.loads((folder / "report.json").read_text())
    return body["pruned"]["macs"] / body["dense"]["macs"]


def wanted(patterns: list[str], seeds: list[int], papers: Collection[str] = PAPERS) -> Iterator[tuple[str, int, Row]]:
    """Rows of some papers in the order of the patterns, each once: all of a case with one seed, then with the next."""
    done = set()
    for pattern in patterns:
        case_pattern, _, row_pattern = pattern.partition(":") if ":" in pattern else ("*", "", pattern)
        for seed in seeds:
            for name, case in CASES.items():
                for row in case.rows:
                    key = (name, seed, row.name)
                    if (
                        key not in done
                        and case.paper in papers
                        and fnmatchcase(name, case_pattern)
                        and fnmatchcase(row.name, row_pattern or "*")
                    ):
                        done.add(key)
                        yield name, seed, row


def collected(rows: Rows) -> list[dict[str, Any]]:
    """The figures of all finished rows of a folder."""
    found = []
    for name, case in CASES.items():
        for place in sorted((rows.out / name).glob("seed_*")):
            seed = int(place.name.removeprefix("seed_"))
            for row in case.rows:
                files = [folder / "report.json" for folder, _ in rows.runs(name, seed, row)]
                if all(file.is_file() for file in files):
                    reports = [json.loads(file.read_text()) for file in files]
                    best = max(reports, key=lambda report: report["finetuned"]["top1"])
                    found.append(tables.figures(name, row.name, seed, best, rows.words))
    return found


def main() -> None:
    """Read the command line, run, and print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("papers", nargs="*", metavar="PAPER", help=f"{', '.join(PAPERS)} (default: all)")
    parser.add_argument("--row", "--only", nargs="+", default=["*"], help="patterns ROW or CASE:ROW, in order of work")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    parser.add_argument("--list", action="store_true", help="print every row, its recipe and its overrides")
    parser.add_argument("--collect", type=Path, metavar="FILE", help="add all figures to one compact file")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables as an HTML page as well")
    parser.add_argument("--results", type=Path, metavar="FILE", help="--table: of this compact file")
    given = parser.parse_args()
    if unknown := [name for name in given.papers if name not in PAPERS]:
        parser.error(f"PAPER: there is no {unknown[0]!r}; {', '.join(PAPERS)} have tables that two cores can run")
    papers = given.papers or PAPERS
    if not list(wanted(given.row, [0], papers)):
        parser.error(f"--row: no row of {', '.join(papers)} is called {' or '.join(given.row)}; see --list")
    if given.list:
        for name, _, row in wanted(given.row, [0], papers):
            print(f"{name}:{row.name}  {row.recipe or CASES[name].recipe} {' '.join((*CASES[name].words, *row.words))}")
        return
    if given.table and given.results:
        show(tables.load(given.results), given.page)
        return
    rows = Rows(given.out, time.monotonic() + 60 * given.minutes, given.set)
    if given.collect:
        old = tables.load(given.collect) if given.collect.exists() else []
        write_atomic(given.collect, tables.compact(tables.merge(old, collected(rows))))
    if not given.collect and not given.table:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for case, seed, row in wanted(given.row, given.seeds, papers):
            if not rows.run(case, seed, row) and time.monotonic() > rows.deadline:
                break
    show(collected(rows), given.page)


def show(found: list[dict[str, Any]], page: Path | None) -> None:
    """Print the tables, and write their page."""
    print(tables.markdown(found))
    if page is not None:
        write_atomic(page, render_papers(tables.for_page(found), "benchmarks/papers.py"))


if __name__ == "__main__":
    main()
