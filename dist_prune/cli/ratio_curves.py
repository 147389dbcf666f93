"""``dist-prune ratio-curves``: what each channel group alone can lose, as a plot and as CSV.

One process, or many: ``torchrun --nproc_per_node 2 -m dist_prune.cli ratio-curves RECIPE`` (or accelerate launch -m).
"""

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.errors import PruneError, shown

RATIOS = "0.9,0.7,0.5,0.3,0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("recipe", help="a YAML file, or a name in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run-dir", help="where dense weights, scores and curves are kept (default: runs/<its name>)")
    parser.add_argument("--ratios", default=RATIOS, metavar="A,B,C", help=f"shares to keep (default: {RATIOS})")
    parser.add_argument(
        "--images", default="1000", metavar="N", help="images drawn by the seed, or all (default: 1000)"
    )
    parser.add_argument(
        "--split", choices=("held-out", "test"), default="held-out",
        help="what judges: training images that train.holdout holds out (default), or test images, which is marked",
    )  # fmt: skip
    parser.add_argument(
        "--max-drop", type=float, default=1.0, metavar="POINTS",
        help="suggest for each group the smallest ratio that costs at most so many points of top-1 (default: 1)",
    )  # fmt: skip


def run(given: argparse.Namespace) -> tuple[str, Any, int]:
    """Train or load the dense network, score, measure every group at every ratio; the first process says the result."""
    from dist_prune.analysis.ratio_curves import check
    from dist_prune.config.recipe import Recipe
    from dist_prune.distributed.environment import DistributedEnvironment
    from dist_prune.pipeline.context import RunContext
    from dist_prune.run import launched, run

    ratios, images = _numbers(given)

    def choose() -> tuple[Recipe, Path]:
        recipe = loading.load(given.recipe, given.overrides, methods.options_of)
        check(recipe, methods.build(recipe.method))
        return recipe, Path(os.environ.get("DIST_PRUNE_RUNS", "runs")) / recipe.name

    def then(context: RunContext) -> None:
        from dist_prune.analysis.ratio_curves import RatioRequest, measure

        asked = RatioRequest(ratios, images, "test" if given.split == "test" else "held_out")
        found = measure(context, asked)
        context.images.close_loaders()
        context.environment.comm.run_on_main(lambda: write(context, found, given))

    def begin(recipe: Recipe, folder: Path, environment: DistributedEnvironment) -> str:
        # --json: what is said meanwhile goes to stderr, the result alone to stdout
        with contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext():
            run(recipe, folder, environment, until="score", then=then)
        if given.json and environment.comm.is_main:
            print((folder / f"{_stem(given.split)}.json").read_text(), flush=True)
        return ""

    return "", None, launched(choose, given.run_dir, begin)


def _numbers(given: argparse.Namespace) -> tuple[tuple[float, ...], int | None]:
    """--ratios and --images; PruneError where they are none."""
    try:
        ratios = tuple(dict.fromkeys(float(word) for word in given.ratios.split(",") if word.strip()))
    except ValueError as error:
        raise PruneError(f"--ratios: numbers with commas between them, got {shown(given.ratios)}") from error
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise PruneError(f"--ratios: shares of the channels to keep, above 0 and below 1, got {shown(given.ratios)}")
    if given.images != "all" and (not given.images.isdigit() or int(given.images) < 1):
        raise PruneError(f"--images: a positive number or 'all', got {shown(given.images)}")
    if given.max_drop < 0:
        raise PruneError(f"--max-drop: points of top-1, at least 0, got {given.max_drop}")
    return ratios, None if given.images == "all" else int(given.images)


def write(context: Any, found: Any, given: argparse.Namespace) -> None:
    """The files of the run directory, TensorBoard's figures, and what the terminal shows."""
    from dist_prune.fileio import write_atomic
    from dist_prune.report.ratio_curves_html import lines_figure, render_ratio_curves

    keep = found.suggestion(given.max_drop)
    body = {
        "dense": asdict(found.dense), "images": found.images, "where": found.where, "max_drop": given.max_drop,
        "keep_ratios": keep, "groups": [asdict(line) for line in found.ordered],
    }  # fmt: skip
    stem = _stem(given.split)
    page, table = context.run_dir / f"{stem}.html", context.run_dir / f"{stem}.csv"
    write_atomic(context.run_dir / f"{stem}.json", json.dumps(body, indent=1))
    write_atomic(table, found.csv())
    suggestion = suggestion_text(keep, given.max_drop, found.whole)
    write_atomic(page, render_ratio_curves(context.recipe.name, context.recipe.method["name"], body, suggestion))
    context.tracker.figure(stem.replace("_", " "), lines_figure(body))
    for line in found.ordered:
        for point in line.points:
            context.tracker.scalars({f"{stem}/{line.group}": point.top1}, round(100 * point.ratio))
    context.tracker.info(as_text(found, suggestion))
    context.tracker.info(f"\ncurves       {page.resolve()}\ntable        {table.resolve()}")


def as_text(found: Any, suggestion: str) -> str:
    """Top-1 of every group at every ratio, most sensitive first, and the suggestion."""
    ratios = [point.ratio for point in found.ordered[0].points]
    wide = max(5, *(len(line.group) for line in found.ordered))
    lines = [
        f"dense: top-1 {found.dense.top1:.2f} %, loss {found.dense.loss:.4f}, on {found.images} {found.where}",
        f"{'group':{wide}}  width  " + "  ".join(f"{ratio:>6g}" for ratio in ratios),
    ]
    for line in found.ordered:
        lines.append(f"{line.group:{wide}}  {line.width:5}  " + "  ".join(f"{p.top1:6.2f}" for p in line.points))
    return "\n".join([*lines, "", suggestion])


def suggestion_text(keep: dict[str, float], most: float, whole: str | None) -> str:
    """The suggestion as words for a command line; ``whole``: those that leave the other groups whole."""
    if not keep:
        return f"every group alone loses more than {most:g} point(s) of top-1 at every ratio"
    words = ", ".join(f"{name}: {ratio:g}" for name, ratio in keep.items())
    return (
        f"each of these groups alone loses at most {most:g} point(s), nothing finetuned (together they lose more):\n"
        f"  'select.keep_ratios={{{words}}}'"
        + (f" {whole}" if whole else "\n(this method has no keep ratio: the other groups are cut as the recipe asks)")
    )


def _stem(split: str) -> str:
    """Figures of test images have files of their own."""
    return "ratio_curves_test" if split == "test" else "ratio_curves"
