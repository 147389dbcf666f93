"""The pictures of pages in the README: real pages of small runs, photographed light and dark.

    make browser
    python -m tests.support.pictures [FOLDER]      (docs/images; about ten minutes on one core)

The report is that of the quickstart in one process; the comparison is of three methods at three targets by two seeds.
"""

import contextlib
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

from dist_prune import run
from dist_prune.cli.main import main as command
from tests.support.browser import browser, photograph
from tests.support.launch import ROOT, SMALL, report

SIZE = (1080, 925)
ONE = ("report.threads=1", "report.latency_repeats=200")
COMPARED = (*SMALL, "train.epochs=6", "report.threads=1", "report.latency_repeats=50", "report.trackers=[]")
CRITERIA = "graph,l1,taylor,fpgm,chip,hrank"
METHODS, TARGETS, SEEDS = ("graph", "l1", "taylor"), (0.4, 0.6, 0.8), (0, 1)


def steady(folder: Path) -> Path:
    """A run of the quickstart whose times are reliable, or the last of three on a busy machine."""
    place = folder
    for attempt in range(3):
        place = folder / str(attempt)
        assert run.main(["--recipe", "quickstart", "--run-dir", str(place), *ONE]) == 0
        times = [times for kind in ("dense", "finetuned") for times in report(place)[kind]["latency"].values()]
        if all(one["reliable"] for one in times):
            break
    return place


def pages(folder: Path) -> dict[str, Path]:
    """Make the pages; name of a picture -> page."""
    quick = steady(folder / "quickstart")
    for method, target, seed in product(METHODS, TARGETS, SEEDS):
        place = folder / "runs" / f"{method}-{target}-{seed}"
        words = (*COMPARED, f"method.name={method}", f"target.macs={target}", f"seed={seed}")
        assert run.main(["--recipe", "quickstart", "--run-dir", str(place), *words]) == 0
    with contextlib.chdir(folder):  # the page names the folder as the command does
        assert command(["compare", "runs", "--out", "compare"]) == 0
    assert command(["ratio-curves", "quickstart", "--run-dir", str(quick), *ONE]) == 0
    scored = ["score-many", "quickstart", "--run-dir", str(folder / "many"), "--methods", CRITERIA, *ONE]
    assert command(scored) == 0
    return {
        "report": quick / "report.html",
        "compare": folder / "compare/compare.html",
        "ratio_curves": quick / "ratio_curves.html",
        "score_many": folder / "many/criteria.html",
    }


def main(target: Path) -> None:
    """Make the pages and their pictures."""
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        made = pages(Path(folder))
        with browser(Path(folder) / "window") as window:
            for (name, page), dark in product(made.items(), (False, True)):
                picture = target / f"{name}{'_dark' if dark else ''}.png"
                photograph(window, page, picture, *SIZE, dark)
                print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/images"))
