"""The page of papers' tables run at length: what the paper has, what was measured here, and random at the same size."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_prune.report.headline import ALIKE, Card, Sentence
from dist_prune.report.html import render
from dist_prune.report.plots import Mark, Plot, figure

RANDOM = "random"  # name of the row that every other one is compared with


@dataclass(frozen=True)
class PaperRow:
    """One way of pruning.

    Attributes:
        name: of the row.
        paper: what the paper has; empty: not at hand.
        cut: top-1 in percent after the cut, one for each seed; empty: not run.
        finetuned: the same after finetuning.
        macs: share of the MACs that is left.
        params: share of the parameters that is left.
    """

    name: str
    paper: str = ""
    cut: Sequence[float] = ()
    finetuned: Sequence[float] = ()
    macs: float | None = None
    params: float | None = None


@dataclass(frozen=True)
class PaperTable:
    """A dense network and the rows that were cut from it.

    Attributes:
        name: of the table.
        paper: of which paper.
        recipe: that trains the dense network.
        note: what a reader has to know of all rows.
        dense: top-1 in percent of the dense networks, one for each seed.
        paper_dense: what the paper or its program has for it; empty: not at hand.
        rows: in order.
    """

    name: str
    paper: str
    recipe: str
    note: str
    dense: Sequence[float]
    paper_dense: str
    rows: Sequence[PaperRow]


def render_papers(tables: Sequence[PaperTable], source: str) -> str:
    """The page as HTML.

    Args:
        tables: those with a row that was run are drawn, the others are named.
        source: the command that measured.
    """
    run = [table for table in tables if any(row.finetuned for row in table.rows)]
    rows = sum(bool(row.finetuned) for table in tables for row in table.rows)
    missing = [table.name for table in tables if table not in run]
    return render(
        "papers.html.j2",
        line=f"Measured by {source}. Top-1 in percent on the test images; ± is the standard deviation over seeds.",
        sentences=[sentence for table in run for sentence in _verdict(table)],
        cards=[
            Card("tables", f"{len(run)} of {len(tables)}", "with a row that was run"),
            Card("rows", f"{rows} of {sum(len(table.rows) for table in tables)}", "run at the papers' length"),
        ],
        tables=[
            {
                "title": f"{table.name}: {table.paper}", "note": f"{table.note} Recipe {table.recipe}.",
                "dense": _dense(table), "table": _cells(table), "figure": _figure(table),
            }
            for table in run
        ],
        missing=missing,
    )  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Mean, and sample standard deviation of several values."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _verdict(table: PaperTable) -> list[Sentence]:
    """Which rows can be told from random, by the deviations over seeds."""
    found: Mapping[str, Sequence[float]] = {row.name: row.finetuned for row in table.rows if row.finetuned}
    if RANDOM not in found or len(found) < 2:
        return [Sentence("doubt", f"{table.name}: random at the same size was not run, so nothing is compared.")]
    if min(map(len, found.values())) < 2:
        best = max(found, key=lambda name: statistics.mean(found[name]))
        text = f"{table.name}: {best} has {spread(found[best])}, random {spread(found[RANDOM])}. "
        return [Sentence("doubt", text + "A row has a single seed, so no difference can be told.")]
    sentences = []
    for name, values in found.items():
        difference = statistics.mean(values) - statistics.mean(found[RANDOM])
        error = sum(statistics.variance(one) / len(one) for one in (values, found[RANDOM])) ** 0.5
        if name != RANDOM and abs(difference) > ALIKE * error:
            word, level = ("ahead of", "good") if difference > 0 else ("behind", "bad")
            sentences.append(Sentence(level, f"{table.name}: {name} is {abs(difference):.2f} points {word} random."))
    return sentences or [Sentence("plain", f"{table.name}: no row can be told from random.")]


def _dense(table: PaperTable) -> str:
    paper = f"; paper or program: {table.paper_dense}" if table.paper_dense else ""
    return f"Dense: {spread(table.dense)}{paper}." if table.dense else f"Dense: not run{paper}."


def _cells(table: PaperTable) -> tuple[list[str], list[list[str]]]:
    heads = ["row", "paper", "MACs left", "parameters left", "after the cut", "finetuned", "seeds"]
    lines = []
    for row in table.rows:
        if not row.finetuned:
            lines.append([row.name, row.paper or "not at hand", "", "", "", "not run", "0"])
            continue
        shares = ["" if share is None else f"{share:.1%}" for share in (row.macs, row.params)]
        count = str(len(row.finetuned))
        lines.append([row.name, row.paper or "not at hand", *shares, spread(row.cut), spread(row.finetuned), count])
    return heads, lines


def _figure(table: PaperTable) -> dict[str, object]:
    """The rows side by side: hollow after the cut, filled after finetuning, a level for the dense network."""
    run = [row for row in table.rows if row.finetuned]
    marks = []
    for number, row in enumerate(run):
        for values, hollow, word in ((row.cut, True, "after the cut"), (row.finetuned, False, "finetuned")):
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            text = f"{row.name}, {word}: top-1 {spread(values)} %"
            marks.append(Mark(number + 1, statistics.mean(values), text, number, hollow, error))
    levels = [(statistics.mean(table.dense), f"dense: {spread(table.dense)} %")] if table.dense else []
    plot = Plot("row of the table", "top-1 %", marks=marks, levels=levels, integers=True)
    return figure("", [plot], [(number, row.name) for number, row in enumerate(run)])
