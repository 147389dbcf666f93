"""The page of ``dist-prune compare``: sections by network, colours and shapes by method, Pareto fronts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_prune.pruning.selection.cost import report_costs
from dist_prune.report.headline import Card, Sentence
from dist_prune.report.html import render
from dist_prune.report.plots import Line, Mark, Plot, figure, legend, pareto
from dist_prune.report.tables import time_keys
from dist_prune.tasks.primary import PrimaryFigure

Row = dict[str, Any]
CLOSE = 1.0  # points, or percent of another figure, below the dense network that the head of the page calls close
PAPERS = "top1"  # the figure whose changes papers' points are
FILTERS = ("task", "network", "method", "target", "seed")


@dataclass(frozen=True)
class TaskRuns:
    """The runs of one task. Their figures share axes with no other task.

    Attributes:
        task: The rows' ``task``.
        title: Title of their table.
        figure: The figure that they are judged by.
        heads: Column heads of their table.
        lines: (figures, cells) of each row: the mean over a recipe's seeds, then its seeds (``cli/compare.py``).
    """

    task: str
    title: str
    figure: PrimaryFigure
    heads: Sequence[str]
    lines: Sequence[tuple[Row, list[str]]]

    @property
    def networks(self) -> list[str]:
        """The names of their networks."""
        return sorted({row["backbone"] for row, _ in self.lines})

    def of(self, network: str) -> list[Row]:
        """The rows of a network."""
        return [row for row, _ in self.lines if row["backbone"] == network]


def render_comparison(
    title: str,
    parts: Sequence[TaskRuns],
    papers: Sequence[Row],
    batches: Sequence[str],
    others: Sequence[tuple[str, list[str], list[list[str]]]],
    note: str = "",
) -> str:
    """The comparison page, as HTML.

    Args:
        title: What is compared.
        parts: The runs of each task.
        papers: The papers' points: ``recipe``, ``point``, ``change`` of top-1, and shares of costs (``<cost>_share``).
        batches: Batch sizes of the latency: one, or several if no one is common to all runs.
        others: (title, column heads, rows of cells) of further tables.
        note: A sentence on what cannot be compared; empty for none.
    """
    rows = [row for part in parts for row, _ in part.lines]
    means = [row for row in rows if row["seed"].startswith("mean")]
    methods = sorted({row["method"] for row in rows})
    names = [*enumerate(methods), (len(methods), "dense network"), *([(len(methods) + 1, "paper")] if papers else [])]
    several = len(parts) > 1
    facets = []
    for part in parts:
        own_papers = papers if part.figure.key == PAPERS else []
        facets += [
            (
                {"network": network, "task": part.task},
                _facet_title(network, part, several),
                figure("", panels(part.of(network), own_papers, batches, methods, part.figure)),
            )
            for network in part.networks
        ]
    return render(
        "compare.html.j2",
        title=title,
        sentences=[
            *(
                _closest(_facet_title(network, part, several), part.of(network), part.figure, batches)
                for part in parts
                for network in part.networks
            ),
            *([Sentence("doubt", note)] if note else []),
        ],
        cards=_cards(means, parts, methods, others),
        filters=filters(rows),
        legend=legend(names) if rows else [],
        facets=facets,
        tables=[
            (part.title, part.heads, [(row["name"], _data(row), row, cells[1:]) for row, cells in part.lines])
            for part in parts
        ],
        others=others,
    )


def _facet_title(network: str, part: TaskRuns, several: bool) -> str:
    """The title of a network's plots; with the task where the page has several."""
    return f"{network}, {part.task}" if several else network


def _cards(
    means: Sequence[Row], parts: Sequence[TaskRuns], methods: Sequence[str], others: Sequence[Any]
) -> list[Card]:
    unfinished = sum(len(rows) for title, _, rows in others if title == "Not finished")
    runs = sum(row["seeds"] for row in means)
    networks = sorted({network for part in parts for network in part.networks})
    return [
        Card("runs", str(runs), f"{len(means)} recipe(s)"),
        *([Card("tasks", str(len(parts)), ", ".join(part.task for part in parts))] if len(parts) > 1 else []),
        Card("networks", str(len(networks)), ", ".join(networks[:3]) + (" …" if len(networks) > 3 else "")),
        Card("methods", str(len(methods)), ", ".join(methods[:4]) + (" …" if len(methods) > 4 else "")),
        *([Card("not finished", str(unfinished), "with their reasons below")] if unfinished else []),
    ]


def _closest(title: str, rows: Sequence[Row], figure: PrimaryFigure, batches: Sequence[str]) -> Sentence:
    """The run that costs least among those close to their dense network."""
    own = [row for row in rows if row["seed"].startswith("mean")]
    close = [row for row in own if _is_close(row, figure) and row.get("macs_share") is not None]
    reach = f"{CLOSE:g} point(s)" if figure.percent else f"{CLOSE:g} % of the {figure.name}"
    if not close:
        return Sentence("doubt", f"{title}: none of {len(own)} is within {reach} of its dense network.")
    best = min(close, key=lambda row: row["macs_share"])
    ratios = {batch: best[f"speedup{end}"] for batch, end in time_keys(batches).items()}
    speeds = [
        f"{ratio:.2f} times as fast" + (f" at batch {batch}" if len(batches) > 1 else "")
        for batch, ratio in ratios.items()
        if ratio
    ]
    speed = "".join(f", {text}" for text in speeds)
    unit = " points" if figure.percent else ""
    return Sentence(
        "plain",
        f"{title}: within {reach} of its dense network, {best['name']} leaves the fewest MACs "
        f"({best['macs_share']:.1%}{speed}, {figure.name} {figure.signed(best['change'])}{unit}).",
    )


def _is_close(row: Row, figure: PrimaryFigure) -> bool:
    dense = row[f"dense_{figure.key}"]
    lost = figure.lost(dense, dense + row["change"])
    return lost <= (CLOSE if figure.percent else abs(dense) * CLOSE / 100)


def filters(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The selections of the page: (key, (value, text) of each choice); those without a choice are left out."""
    out = []
    for key in FILTERS:
        values = sorted({value for row in rows for value in _data(row)[key].split("|")} - {""})
        if key == "seed":
            seeds = [value for value in values if value != "mean"]
            choices = [("mean", "mean over seeds"), *((seed, f"seed {seed}") for seed in sorted(seeds, key=_as_number))]
            several = len(seeds) > 1
        else:
            choices, several = [("", f"all {key}s"), *((value, value) for value in values)], len(values) > 1
        if several:
            out.append((key, choices))
    return out


def _as_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.lstrip("-").isdigit() else (0, text)


def _data(row: Row) -> dict[str, str]:
    keys = {"network": row["backbone"], "method": row["method"], "target": row["target"], "seed": row["seed"]}
    return {"task": row["task"], **keys}


def panels(
    rows: Sequence[Row],
    papers: Sequence[Row],
    batches: Sequence[str],
    methods: Sequence[str],
    primary: PrimaryFigure,
) -> list[Plot]:
    """Plots of one network: the figure against each cost and the time, then its change against the shares left.

    Times that are not reliable are hollow and stay out of the fronts; far ones stand at the end of the axis.

    Args:
        rows: Figures of the means and of the seeds.
        papers: The papers' points.
        batches: Batch sizes of the latency; one that no row was timed at is left out.
        methods: All methods of the page; their number is their colour and shape.
        primary: The figure that the runs are judged by.
    """
    costs = [cost for cost in report_costs() if any(row[cost.name] is not None for row in rows)]
    stems = {row["run"].split(" (")[0].split("-")[0] for row in rows}
    points = [point for point in papers if point["recipe"] in stems]
    plots = []
    ends = {b: end for b, end in time_keys(batches).items() if any(row[f"ms{end}"] is not None for row in rows)}
    for key, title, end in [
        *((cost.name, cost.label, None) for cost in costs),
        *((f"ms{end}", f"ms, batch {batch}", end) for batch, end in ends.items()),
    ]:
        others = _dense(rows, key, end, len(methods), primary)
        plots.append(_panel(rows, key, end, title, primary, False, methods, others))
    shares = [(f"{cost.name}_share", f"share of the {cost.unit} left", None) for cost in costs]
    for key, title, end in [*shares, *(("ratio", f"speed-up, batch {batch}", end) for batch, end in ends.items())]:
        crosses = [
            Mark(point[key], point["change"], f"paper: {point['recipe']}, {point['point']}", len(methods) + 1)
            for point in points
            if point.get(key) is not None
        ]
        plots.append(_panel(rows, key, end, title, primary, True, methods, crosses))
    return plots


def _panel(
    rows: Sequence[Row],
    key: str,
    end: str | None,
    title: str,
    primary: PrimaryFigure,
    change: bool,
    methods: Sequence[str],
    others: Sequence[Mark],
) -> Plot:
    """A plot over a cost, or over a time or ``ratio`` of times, whose keys end with ``end`` (``time_keys``)."""
    figure_key = "change" if change else primary.key
    against = f"{primary.name} against dense" + (", points" if primary.percent else "")
    figure_title = against if change else primary.title
    better, marks, lines = "right" if key == "ratio" else "left", [], []
    places = [_ratio(row, end or "") if key == "ratio" else row[key] for row in rows]
    doubtful = [end is not None and not row[f"reliable{end}"] for row in rows]
    low, high = _limits([x for x, doubt in zip(places, doubtful, strict=True) if not doubt and x is not None])
    for row, x, hollow in zip(rows, places, doubtful, strict=True):
        if x is None:  # the report is older than the cost, or the run was not timed at this batch size
            continue
        data = _data(row) | ({} if hollow else {"front": ""})
        note = "; this time is not reliable" if hollow else ""
        text = f"{row['run']} ({row['name']}): {figure_title} {primary.number(row[figure_key])}, {title} {x:.4g}{note}"
        error = row[f"{primary.key}_std"] or row.get(f"{primary.key}_error") or 0.0
        hidden = not row["seed"].startswith("mean")
        shown = min(max(x, low), high) if hollow else x
        marks.append(Mark(shown, row[figure_key], text, methods.index(row["method"]), hollow, error, data, hidden))
    for number, method in enumerate(methods):
        own = [m for m in marks if m.data["method"] == method and "front" in m.data and not m.hidden]
        front = pareto([(m.x, m.y) for m in own], better, primary.higher_is_better)
        if own:
            shown = front if len(front) > 1 else []
            lines.append(Line(shown, f"front of {method}", number, "front", data={"method": method}))
    levels = [(0.0, "the dense network")] if change else []
    y_title = figure_title if primary.higher_is_better else f"{figure_title} (lower is better)"
    lower = not primary.higher_is_better
    return Plot(title, y_title, lines=lines, marks=[*others, *marks], levels=levels, better=better, lower=lower)


def _ratio(row: Row, end: str) -> float | None:
    """The speed-up, reliable or not; None if the run was not timed at this batch size."""
    return None if row[f"ms{end}"] is None else row[f"dense_ms{end}"] / row[f"ms{end}"]


def _limits(reliable: Sequence[float]) -> tuple[float, float]:
    """The part of the axis that doubtful times may use; one that is further off stands at its end."""
    if not reliable:
        return float("-inf"), float("inf")
    low, high = min(reliable), max(reliable)
    margin = 0.3 * (high - low) or 0.3 * high
    return low - margin, high + margin


def _dense(rows: Sequence[Row], key: str, end: str | None, series: int, primary: PrimaryFigure) -> list[Mark]:
    """The dense networks of the means, each once."""
    found: dict[tuple[float, float], Mark] = {}
    for row in rows:
        doubtful = end is not None and not row[f"reliable{end}"]
        if not row["seed"].startswith("mean") or row[key] is None or doubtful:
            continue
        x = row[f"dense_ms{end}"] if end is not None else row[key] / row[f"{key}_share"]
        value = row[f"dense_{primary.key}"]
        text = f"dense {row['backbone']}: {primary.name} {primary.text(value)}"
        found.setdefault((round(x, 6), round(value, 6)), Mark(x, value, text, series))
    return list(found.values())
