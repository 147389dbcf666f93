"""``dist-prune ratio-curves``: the figure of each channel group pruned alone, as a plot and as CSV.

It runs in one process or in many: ``torchrun --nproc_per_node 2 -m dist_prune.cli ratio-curves RECIPE`` (or
``accelerate launch -m``).
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dist_prune import methods
from dist_prune.cli.verb import Answer, add_recipe
from dist_prune.config import loading
from dist_prune.config.pruning import RepairMethod
from dist_prune.errors import PruneError, shown

if TYPE_CHECKING:  # tasks import torch, which --help does without
    from dist_prune.tasks.primary import PrimaryFigure

RATIOS = "0.9,0.7,0.5,0.3,0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    add_recipe(parser)
    parser.add_argument("--run-dir", help="folder for dense weights, scores and curves (default: runs/<recipe's name>)")
    parser.add_argument("--ratios", default=RATIOS, metavar="A,B,C", help=f"shares to keep (default: {RATIOS})")
    parser.add_argument(
        "--images", default="1000", metavar="N", help="number of images, drawn by the seed, or all (default: 1000)"
    )
    parser.add_argument(
        "--split",
        choices=("held-out", "test"),
        default="held-out",
        help="images to measure on: training images that train.holdout holds out (default), or test images; results "
        "on test images are marked",
    )
    parser.add_argument(
        "--repair",
        choices=get_args(RepairMethod),
        help="measure each cut also after this repair; as repair.method in the recipe (default: the recipe's)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="by how much a group may make the task's figure worse at a ratio that is suggested, in the figure's unit: "
        "points of top-1 or mIoU, the unit of RMSE (default: 1 point, or 1 %% of the dense network's figure)",
    )
    parser.add_argument("--no-times", action="store_true", help="do not measure the speed-up of each cut network")


def run(arguments: argparse.Namespace) -> Answer:
    """Train or load the dense network, score, and measure every group at every ratio.

    Returns:
        No text and no values (the first process prints the result itself), and the exit code.

    Raises:
        PruneError: if an option is out of range.
    """
    from dist_prune.analysis.ratio_curves import check
    from dist_prune.config.recipe import Recipe
    from dist_prune.distributed.environment import DistributedEnvironment
    from dist_prune.pipeline.context import RunContext
    from dist_prune.run import execute, run

    ratios, images = _numbers(arguments)

    def choose() -> tuple[Recipe, Path]:
        repaired = [f"repair.method={arguments.repair}"] if arguments.repair else []
        recipe = loading.load(arguments.recipe, [*arguments.overrides, *repaired], methods.options_of)
        check(recipe, methods.build(recipe.method))
        return recipe, Path(os.environ.get("DIST_PRUNE_RUNS", "runs")) / recipe.name

    def then(context: RunContext) -> None:
        from dist_prune.analysis.cut_times import times_of_curves
        from dist_prune.analysis.ratio_curves import RatioRequest, measure

        request = RatioRequest(ratios, images, "test" if arguments.split == "test" else "held_out")
        curves = measure(context, request)
        context.images.close_loaders()
        times = None
        if not arguments.no_times:
            times = times_of_curves(context, {line.group: [p.kept for p in line.points] for line in curves.lines})
        context.environment.comm.run_on_main(lambda: write(context, curves, times, arguments))

    def begin(recipe: Recipe, folder: Path, environment: DistributedEnvironment) -> str:
        # --json: messages go to stderr, the result alone to stdout
        with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
            run(recipe, folder, environment, until="score", then=then)
        if arguments.json and environment.comm.is_main:
            print((folder / f"{_stem(arguments.split)}.json").read_text(), flush=True)
        return ""

    return "", None, execute(choose, arguments.run_dir, begin)


def _numbers(arguments: argparse.Namespace) -> tuple[tuple[float, ...], int | None]:
    """The values of --ratios and --images (None: all)."""
    try:
        ratios = tuple(dict.fromkeys(float(word) for word in arguments.ratios.split(",") if word.strip()))
    except ValueError as error:
        raise PruneError(f"--ratios: numbers with commas between them, got {shown(arguments.ratios)}") from error
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise PruneError(
            f"--ratios: shares of the channels to keep, above 0 and below 1, got {shown(arguments.ratios)}"
        )
    if arguments.images != "all" and (not arguments.images.isdigit() or int(arguments.images) < 1):
        raise PruneError(f"--images: a positive number or 'all', got {shown(arguments.images)}")
    if arguments.max_drop is not None and not arguments.max_drop >= 0:
        raise PruneError(f"--max-drop: a loss of the task's figure, at least 0, got {arguments.max_drop}")
    return ratios, None if arguments.images == "all" else int(arguments.images)


def write(context: Any, curves: Any, times: Any, arguments: argparse.Namespace) -> None:
    """Write the files of the run directory and TensorBoard's figures, and print the result.

    Args:
        context: the run's ``RunContext``.
        curves: the ``RatioCurves`` that were measured.
        times: the ``CutTimes`` of their networks; None if they were left out.
        arguments: the verb's parsed command line.
    """
    from dist_prune.fileio import write_atomic
    from dist_prune.report.figures import lines_figure
    from dist_prune.report.ratio_curves_html import render_ratio_curves
    from dist_prune.tasks.classification import CLASSIFICATION

    primary, max_drop = curves.primary, largest_drop(curves, arguments.max_drop)
    keep_ratios = curves.suggestion(max_drop)

    def facts(line: Any, point: Any) -> dict[str, Any]:
        return {**point.facts(primary), **(times.facts(line.group, str(point.kept)) if times is not None else {})}

    body = {
        "dense": curves.dense.facts(primary),
        "images": curves.images,
        "where": curves.where,
        "max_drop": max_drop,
        "keep_ratios": keep_ratios,
        "groups": [
            {"group": line.group, "width": line.width, "points": [facts(line, point) for point in line.points]}
            for line in curves.ordered
        ],
        **({"times": dict(times.place)} if times is not None else {}),
        **({} if context.task.name == CLASSIFICATION.name else {"task": context.task.description()}),
    }
    stem = _stem(arguments.split)
    page, table = context.run_dir / f"{stem}.html", context.run_dir / f"{stem}.csv"
    write_atomic(context.run_dir / f"{stem}.json", json.dumps(body, indent=1))
    write_atomic(table, curves.csv(times))
    suggestion = suggestion_text(keep_ratios, max_drop, curves.whole, primary)
    write_atomic(page, render_ratio_curves(context.recipe.name, context.recipe.method["name"], body, suggestion))
    context.tracker.figure(stem.replace("_", " "), lines_figure(body))
    for line in curves.ordered:
        for point in line.points:
            ratio = times.facts(line.group, str(point.kept))["speedup"] if times is not None else None
            scalars = {f"{stem}/{line.group}": point.figure}
            scalars |= {f"{stem}_speedup/{line.group}": ratio} if ratio is not None else {}
            context.tracker.scalars(scalars, round(100 * point.ratio))
    context.tracker.info(as_text(curves, suggestion, times))
    context.tracker.info(f"\ncurves       {page.resolve()}\ntable        {table.resolve()}")


def largest_drop(curves: Any, asked: float | None) -> float:
    """The loss at which a ratio is suggested: the one that was asked for, 1 point, or 1 % of the dense figure.

    Args:
        curves: the ``RatioCurves``.
        asked: the value of ``--max-drop``; None if it was not given.
    """
    if asked is not None:
        return asked
    return 1.0 if curves.primary.percent else float(f"{abs(curves.dense.figure) / 100:.3g}")


def as_text(curves: Any, suggestion: str, times: Any) -> str:
    """The figure and speed-up of every group at every ratio, most sensitive group first, and the suggestion."""
    from dist_prune.report.cut_speed import place_text, speed_text

    ratios = [point.ratio for point in curves.ordered[0].points]
    width = max(10, *(len(line.group) for line in curves.ordered))
    primary = curves.primary
    lines = [
        f"dense: {primary.name} {primary.text(curves.dense.figure)}, loss {curves.dense.loss:.4f}, "
        f"on {curves.images} {curves.where}",
        f"{'group':{width}}  width  " + "  ".join(f"{ratio:>6g}" for ratio in ratios),
    ]
    for line in curves.ordered:
        cells = "  ".join(f"{primary.number(p.figure):>6}" for p in line.points)
        lines.append(f"{line.group:{width}}  {line.width:5}  {cells}")
        if curves.repaired:
            cells = "  ".join(f"{primary.number(p.best):>6}" for p in line.points)
            lines.append(f"{'  repaired':{width}}  {'':5}  {cells}")
        if times is not None:
            speeds = [speed_text(times.facts(line.group, str(p.kept))) for p in line.points]
            lines.append(f"{'  speed-up':{width}}  {'':5}  " + "  ".join(f"{text:>6}" for text in speeds))
    if times is None:
        lines.append("speed-up: not measured (--no-times)")
    else:
        lines.append(f"speed-up: dense over cut, {place_text(times.place)}; ?: not reliable, other work was done")
    return "\n".join([*lines, "", suggestion])


def suggestion_text(keep_ratios: dict[str, float], max_drop: float, whole: str | None, primary: "PrimaryFigure") -> str:
    """The suggestion as text, with ``key=value`` words for a command line.

    Args:
        keep_ratios: layer name of a group -> the suggested share of its channels.
        max_drop: by how much a group alone may make the figure worse.
        whole: words for the command line that leave the other groups whole; None if the method has none.
        primary: the figure that the task is judged by.
    """
    if not keep_ratios:
        return f"every group alone loses more than {primary.points(max_drop)} at every ratio"
    lost = f"{max_drop:g} point(s)" if primary.percent else primary.points(max_drop)
    words = ", ".join(f"{name}: {ratio:g}" for name, ratio in keep_ratios.items())
    return (
        f"each of these groups alone loses at most {lost}, nothing finetuned (together they lose more):"
        f"\n  'select.keep_ratios={{{words}}}'"
        + (f" {whole}" if whole else "\n(this method has no keep ratio: the other groups are cut as the recipe asks)")
    )


def _stem(split: str) -> str:
    """The stem of the files' names; figures of test images have files of their own."""
    return "ratio_curves_test" if split == "test" else "ratio_curves"
