"""``dist-prune compare``: finished runs beside their papers' points, as one table and one page with Pareto plots."""

import argparse
import csv
import html
import io
from pathlib import Path
from typing import Any

from dist_prune.cli.comparison import EXTRAS, TOP1, Comparison, collect, columns, format_cell
from dist_prune.cli.verb import Answer
from dist_prune.fileio import write_atomic
from dist_prune.pruning.selection.cost import report_costs
from dist_prune.report.tables import time_keys
from dist_prune.tasks.primary import PrimaryFigure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("runs", nargs="+", help="run directories, or folders of them (a sweep's runs/NAME)")
    parser.add_argument("--out", metavar="FOLDER", help="folder for compare.csv, compare.md and compare.html")
    parser.add_argument(
        "--batch", help="batch size whose latency is compared (default: the largest that all runs have, or each one)"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Compare the runs as Markdown tables, and write the files if ``--out`` names a folder.

    Raises:
        PruneError: if there is no run, or none was timed at ``--batch``.
    """
    comparison = collect([Path(path) for path in arguments.runs], arguments.batch)
    text = markdown(comparison)
    if arguments.out:
        from dist_prune.report.compare_html import TaskRuns, render_comparison

        folder = Path(arguments.out)
        write_atomic(folder / "compare.csv", as_csv(comparison))
        write_atomic(folder / "compare.md", text)
        parts, others = [], tables(comparison)[len(comparison.figures) :]
        for task, figure in comparison.figures.items():
            own = comparison.of(task)
            heads = _heads(own, figure)
            lines = [(row, [format_cell(key, row[key], figure) for key in heads]) for row in page_rows(own)]
            parts.append(TaskRuns(task, _title(comparison, task), figure, list(heads.values()), lines))
        page = render_comparison(
            ", ".join(arguments.runs), parts, comparison.papers, comparison.batches, others, comparison.note
        )
        write_atomic(folder / "compare.html", page)
        text += f"\n{folder / 'compare.html'}"
    body = {"runs": comparison.rows, "paper": comparison.papers, "unfinished": comparison.unfinished}
    body |= {"note": comparison.note} if comparison.note else {}
    return text, body, 0


def tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables (title, heads, rows of text) of each task's runs, papers' points, unfinished runs; no empty ones."""
    candidates: list[tuple[str, list[str], list[list[str]]]] = []
    for task, figure in comparison.figures.items():
        own = comparison.of(task)
        heads = _heads(own, figure)
        rows = [[format_cell(key, row[key], figure) for key in heads] for row in own.rows]
        candidates.append((_title(comparison, task), list(heads.values()), rows))
    keys = ("recipe", "point", "change", "macs_share", "params_share")
    candidates += [
        (
            "Papers",
            ["recipe", "point", "change, points", "MACs kept", "params kept"],
            [[format_cell(key, point[key]) for key in keys] for point in comparison.papers],
        ),
        ("Not finished", ["run", "why"], [[item["run"], item["why"]] for item in comparison.unfinished]),
    ]
    return [table for table in candidates if table[2]]


def _title(comparison: Comparison, task: str) -> str:
    """The title of a task's table of runs."""
    return "Runs" if comparison.one_task else f"Runs, {task}: {comparison.figures[task].axis_title}"


def _heads(comparison: Comparison, figure: PrimaryFigure) -> dict[str, str]:
    """Key -> head of the columns that some run fills; all runs are of one task."""
    heads = columns(figure, comparison.batches)
    times = [f"{key}{end}" for end in time_keys(comparison.batches).values() for key in ("ms", "speedup") if end]
    costs = [f"{cost.name}{end}" for cost in report_costs() for end in ("", "_share")]
    for key in ("timed", "marked", f"{figure.key}_std", "images", f"{figure.key}_error", *costs, *times):
        if all(row[key] in (None, "") for row in comparison.rows):
            heads.pop(key)
    return heads


def page_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of the page: of each recipe the mean over its seeds, which are listed behind it if there are several.

    ``seed`` is what the page filters by: ``mean``, the seed, or both of a recipe with one seed.
    """
    rows = []
    for row in comparison.rows:
        seeds, alone = row["seed_list"].split(" "), row["seeds"] == 1
        rows.append({**row, "seed": f"mean|{seeds[0]}" if alone else "mean"})
        if not alone:
            common = {key: row[key] for key in ("name", "target")}
            rows += [{**one, **common, "seed": seed} for one, seed in zip(row["each"], seeds, strict=True)]
    return rows


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown."""
    sections = []
    for title, heads, rows in tables(comparison):
        lines = [" | ".join(heads), "|".join(["---"] * len(heads)), *(" | ".join(row) for row in _escape_cells(rows))]
        sections.append(f"**{title}**\n\n" + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join([*sections, *([comparison.note] if comparison.note else [])]) + "\n"


def _escape_cells(rows: list[list[str]]) -> list[list[str]]:
    """Cells that neither break a Markdown table nor bring HTML into a page made of it; quotes stay as they are."""
    return [[html.escape(" ".join(cell.split()), quote=False).replace("|", "/") for cell in row] for row in rows]


def as_csv(comparison: Comparison) -> str:
    """The rows as CSV at full precision, papers' points last.

    The figures of each task have columns of their own; ``task`` says which are filled where a run does not classify.
    """
    stream = io.StringIO()
    names = dict.fromkeys(
        key for figure in comparison.figures.values() or [TOP1] for key in columns(figure, comparison.batches)
    )
    heads = [*names, *EXTRAS, *([] if comparison.one_task else ["task"]), "source"]
    writer = csv.DictWriter(stream, heads, restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "source": "measured"} for row in comparison.rows)
    for point in comparison.papers:
        keys = {key: point[key] for key in ("change", "macs_share", "params_share")}
        writer.writerow(
            {"run": f"{point['recipe']}, {point['point']}", "source": "paper", "task": "classification", **keys}
        )
    return stream.getvalue()
