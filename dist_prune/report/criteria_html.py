"""The page of ``dist-prune score-many``: what each criterion leaves at one target, and what they have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_prune.pruning.selection.cost import report_costs
from dist_prune.report.criteria_tables import criteria_overlap, criteria_table
from dist_prune.report.cut_speed import place_text, ratio_of, speed_card, speed_title
from dist_prune.report.headline import ALIKE, Card, Sentence
from dist_prune.report.html import render
from dist_prune.report.plots import Mark, Plot, figure
from dist_prune.report.tables import standard_error
from dist_prune.tasks.primary import PrimaryFigure

ALIKE_SHARES = 0.0005  # of a cost: criteria that leave as much get no plot of it


def render_criteria(
    name: str,
    network: str,
    lines: Sequence[Mapping[str, Any]],
    task: Mapping[str, Any],
    images: int,
    where: str,
    times: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML.

    Args:
        name: Name of the recipe.
        network: Name of the backbone.
        lines: ``table`` of criteria.json: ``method``, the primary figure, ``repaired`` if there was a repair, shares of
            costs, ``overlap``, and of a network that was timed ``ms``, ``dense_ms``, ``speedup``, ``reliable``.
        task: What a report says of the task (``Task.description``).
        images: Number of images that were measured.
        where: What they are.
        times: Where the networks were timed: ``batch``, ``device``, ``threads``; None if they were not.
    """
    ranked = _ranked(lines, task)
    lines = [*ranked, *(line for line in lines if line not in ranked)]
    return render(
        "criteria.html.j2",
        name=name,
        line=f"{network}, every criterion at the same target, nothing finetuned, on {images:,} {where}.",
        sentences=_verdict(lines, task, images),
        cards=_cards(network, lines, task, images, times),
        table=criteria_table(lines, task, images),
        overlap=criteria_overlap(lines),
        figures=[_figure(lines, task, images, times)],
        times=place_text(times) if times is not None else "",
    )


def _key(lines: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> str:
    return "repaired" if "repaired" in lines[0] else task["primary"]


def _ranked(lines: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    key = _key(lines, task)
    finite = [line for line in lines if line[key] == line[key]]
    return sorted(finite, key=lambda line: line[key], reverse=task.get("higher_is_better", True))


def _error(line: Mapping[str, Any], key: str, task: Mapping[str, Any], images: int) -> float | None:
    return standard_error({"": {task["primary"]: line[key], "images": images}}, "", task["primary"])


def _verdict(lines: Sequence[Mapping[str, Any]], task: Mapping[str, Any], images: int) -> list[Sentence]:
    ranked, key = _ranked(lines, task), _key(lines, task)
    primary = PrimaryFigure.of(task)
    after = " after the repair" if key == "repaired" else ""
    if not ranked:
        return [Sentence("bad", f"{primary.name} is not a number for any criterion.")]
    best, error = ranked[0], _error(ranked[0], key, task, images)
    sentences = [
        Sentence("good", f"{best['method']} leaves the best network: {primary.name} {primary.text(best[key])}{after}.")
    ]
    if error is not None:
        close = []
        for line in ranked[1:]:
            spread = (error**2 + (_error(line, key, task, images) or 0.0) ** 2) ** 0.5
            if abs(best[key] - line[key]) <= ALIKE * spread:
                close.append(line["method"])
        if close:
            text = (
                f"Within {ALIKE:g} standard errors of it: {', '.join(close)}. {images:,} images cannot tell them apart."
            )
            sentences.append(Sentence("doubt", text))
    return sentences


def _cards(
    network: str,
    lines: Sequence[Mapping[str, Any]],
    task: Mapping[str, Any],
    images: int,
    times: Mapping[str, Any] | None,
) -> list[Card]:
    ranked, key = _ranked(lines, task), _key(lines, task)
    cards = [Card("network", network), Card("criteria", str(len(lines)), f"{images:,} images")]
    for word, line in (("best", ranked[0]), ("last", ranked[-1])) if ranked else ():
        error = _error(line, key, task, images)
        text = f"± {error:.2f}" if error is not None else ""
        primary = PrimaryFigure.of(task)
        cards.append(Card(f"{word}: {line['method']}", primary.number(line[key]), f"{primary.axis_title} {text}"))
    for cost in report_costs():
        shares = [line[cost.name] for line in lines if cost.name in line]
        if shares:
            low, high = min(shares), max(shares)
            value = f"{low:.1%}" if high - low < 0.0005 else f"{low:.1%} to {high:.1%}"
            cards.append(Card(f"{cost.title} left", value))
    cards.append(speed_card(times, [(line["method"], line) for line in lines]))
    return cards


def _figure(
    lines: Sequence[Mapping[str, Any]], task: Mapping[str, Any], images: int, times: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Plot the figure by rank, over the costs that differ among the criteria, and over the speed-up."""
    plots = [_plot(lines, task, images, "rank", range(1, len(lines) + 1))]
    for cost in (cost for cost in report_costs() if cost.name in lines[0]):
        shares = [line[cost.name] for line in lines]
        if max(shares) - min(shares) > ALIKE_SHARES:
            plots.append(_plot(lines, task, images, f"share of the {cost.unit} left", shares))
    if times is not None:
        ratios = [ratio_of(line) or float("nan") for line in lines]
        plots.append(_plot(lines, task, images, f"speed-up, {place_text(times)}", ratios, timed=True))
    return figure("", plots, [(number, line["method"]) for number, line in enumerate(lines)])


def _plot(
    lines: Sequence[Mapping[str, Any]],
    task: Mapping[str, Any],
    images: int,
    x_title: str,
    xs: Sequence[float],
    timed: bool = False,
) -> Plot:
    figure_of_task, repaired = PrimaryFigure.of(task), "repaired" in lines[0]
    primary, title = figure_of_task.key, figure_of_task.title
    marks = []
    for number, (line, x) in enumerate(zip(lines, xs, strict=True)):
        for key in [primary, *(["repaired"] if repaired else [])]:
            note = ", repaired" if key == "repaired" else ""
            place = speed_title(line) if timed else f"{x_title} {x:.4g}"
            text = f"{line['method']}{note}: {title} {figure_of_task.number(line[key])}, {place}"
            error = _error(line, key, task, images) or 0.0
            hollow = (repaired and key == primary) or (timed and line["speedup"] is None)
            marks.append(Mark(x, line[key], text, number, hollow, error))
    return Plot(x_title, figure_of_task.axis_title, marks=marks, integers=x_title == "rank")
