"""``dist-prune ratio-curves``: what each channel group alone can lose, as a plot and as CSV.

One process, or many: ``torchrun --nproc_per_node 2 -m dist_prune.cli ratio-curves RECIPE`` (or accelerate launch -m).
"""

import argparse
import contextlib
import html as escape
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_prune import methods, reading
from dist_prune.errors import PruneError, shown

RATIOS = "0.9,0.7,0.5,0.3,0.1"
NAMED = 10  # groups that the plot of lines names; the others are grey


def arguments(parser: argparse.ArgumentParser) -> None:
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


def act(given: argparse.Namespace) -> tuple[str, Any, int]:
    """Train or load the dense network, score, measure every group at every ratio; the first process says the result."""
    from dist_prune.recipe import Recipe
    from dist_prune.run import launched, run
    from dist_prune.runtime.machine import Machine
    from dist_prune.stages.ratios import check
    from dist_prune.stages.work import Work

    ratios, images = _numbers(given)

    def choose() -> tuple[Recipe, Path]:
        spec = reading.load(given.recipe, given.overrides, methods.options_of)
        check(spec, methods.build(spec.method))
        return spec, Path(os.environ.get("DIST_PRUNE_RUNS", "runs")) / spec.name

    def then(work: Work) -> None:
        from dist_prune.stages.ratios import Asked, measured

        asked = Asked(ratios, images, "test" if given.split == "test" else "held_out")
        found = measured(work, asked)
        work.close_feeds()
        work.machine.ranks.together(lambda: write(work, found, given))

    def begin(spec: Recipe, folder: Path, machine: Machine) -> str:
        # --json: what is said meanwhile goes to stderr, the result alone to stdout
        with contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext():
            run(spec, folder, machine, until="score", then=then)
        if given.json and machine.ranks.first:
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


def write(work: Any, found: Any, given: argparse.Namespace) -> None:
    """The files of the run directory, TensorBoard's figures, and what the terminal shows."""
    from dist_prune.ledger import write_atomic

    keep = found.suggestion(given.max_drop)
    body = {
        "dense": asdict(found.dense), "images": found.images, "where": found.where, "max_drop": given.max_drop,
        "keep_ratios": keep, "groups": [asdict(line) for line in found.ordered],
    }  # fmt: skip
    stem = _stem(given.split)
    page, table = work.folder / f"{stem}.html", work.folder / f"{stem}.csv"
    write_atomic(work.folder / f"{stem}.json", json.dumps(body, indent=1))
    write_atomic(table, found.csv())
    write_atomic(page, html(work.recipe.name, work.recipe.method["name"], found, keep, given.max_drop))
    work.tracker.figure(stem.replace("_", " "), lines_figure(found))
    for line in found.ordered:
        for point in line.points:
            work.tracker.scalars({f"{stem}/{line.group}": point.top1}, round(100 * point.ratio))
    work.tracker.say(as_text(found, keep, given.max_drop))
    work.tracker.say(f"\ncurves       {page.resolve()}\ntable        {table.resolve()}")


def as_text(found: Any, keep: dict[str, float], most: float) -> str:
    """Top-1 of every group at every ratio, most sensitive first, and the suggestion."""
    ratios = [point.ratio for point in found.ordered[0].points]
    wide = max(5, *(len(line.group) for line in found.ordered))
    lines = [
        f"dense: top-1 {found.dense.top1:.2f} %, loss {found.dense.loss:.4f}, on {found.images} {found.where}",
        f"{'group':{wide}}  width  " + "  ".join(f"{ratio:>6g}" for ratio in ratios),
    ]
    for line in found.ordered:
        lines.append(f"{line.group:{wide}}  {line.width:5}  " + "  ".join(f"{p.top1:6.2f}" for p in line.points))
    return "\n".join([*lines, "", suggested(keep, most, found.whole)])


def suggested(keep: dict[str, float], most: float, whole: str | None) -> str:
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


def html(name: str, method: str, found: Any, keep: dict[str, float], most: float) -> str:
    """One page without links: curves, drops as a map, the table."""
    from dist_prune.picture import svg
    from dist_prune.stages.page import STYLE

    e = escape.escape
    ratios = [point.ratio for point in found.ordered[0].points]
    head = "".join(f"<th>{ratio:g}</th>" for ratio in ratios)
    rows = "".join(
        f"<tr><td><code>{e(line.group)}</code></td><td>{line.width}</td>"
        + "".join(
            f"<td title='{p.kept} channels, {p.macs:.1%} of the MACs, loss {p.loss:.4f}'>{p.top1:.2f}</td>"
            for p in line.points
        )
        + f"<td>{keep.get(line.group, '')}</td></tr>"
        for line in found.ordered
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{e(name)}: ratio curves</title><style>{STYLE}</style>"
        f"<h1>{e(name)}: what each group alone can lose</h1><p class=sub>Method {e(method)}, one group cut at a time, "
        f"nothing finetuned. Dense: top-1 {found.dense.top1:.2f} %, loss {found.dense.loss:.4f}, on {found.images} "
        f"{e(found.where)}.</p>{svg(lines_figure(found))}<h2>Points of top-1 lost</h2>{svg(map_figure(found))}"
        f"<h2>Top-1 % by keep ratio</h2><table><thead><tr><th>group</th><th>width</th>{head}<th>at most {most:g} "
        f"points</th></tr></thead><tbody>{rows}</tbody></table><h2>Suggestion</h2><pre style='white-space:pre-wrap'>"
        f"{e(suggested(keep, most, found.whole))}</pre></html>"
    )


def lines_figure(found: Any) -> Any:
    """Top-1 and loss against the keep ratio: a line per group, the most sensitive named, the dense network's dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("top1", "loss"), ("top-1 %", "cross-entropy"), strict=True):
        dense = getattr(found.dense, key)
        for place, line in reversed(list(enumerate(found.ordered))):
            named = place < NAMED
            axes.plot(
                [1.0, *(point.ratio for point in line.points)], [dense, *(getattr(p, key) for p in line.points)],
                marker="o", markersize=3, linewidth=1.2 if named else 0.8, color=f"C{place}" if named else "#c3cad2",
                label=line.group if named else None, zorder=3 if named else 1,
            )  # fmt: skip
        axes.axhline(dense, color="#1d2733", linewidth=0.9, linestyle="--", label="dense")
        axes.set(xlabel="share of the group's channels kept", ylabel=label)
        axes.invert_xaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = [labels.index("dense"), *(labels.index(line.group) for line in found.ordered[:NAMED])]
    more = len(found.ordered) - NAMED
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside right upper", frameon=False, fontsize=7,
        title="most sensitive first" + (f",\n{more} more in grey" if more > 0 else ""), title_fontsize=7,
    )  # fmt: skip
    return figure


def map_figure(found: Any) -> Any:
    """A row per group, most sensitive first, a column per ratio; the darker, the more points of top-1 are lost."""
    from matplotlib.figure import Figure

    drops = [[found.dense.top1 - point.top1 for point in line.points] for line in found.ordered]
    figure = Figure(figsize=(7, max(1.6, 0.22 * len(drops) + 0.9)), layout="constrained")
    axes = figure.subplots()
    top = max(1.0, *(value for row in drops for value in row))
    axes.imshow(drops, cmap="Oranges", vmin=0, vmax=top, aspect="auto")
    for row, values in enumerate(drops):
        for column, value in enumerate(values):
            colour = "white" if value > 0.6 * top else "#1d2733"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(drops)), [line.group for line in found.ordered], fontsize=7)
    axes.set_xticks(range(len(drops[0])), [f"{point.ratio:g}" for point in found.ordered[0].points], fontsize=7)
    axes.set_xlabel("share of the group's channels kept")
    axes.spines[:].set_visible(False)
    return figure
