"""Rendering of self-contained HTML pages from templates that escape all values, and the report page of a run."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.report import figures, tables
from dist_prune.report.search_figures import search_figures


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("dist_prune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """A page from a template.

    Args:
        template: File name in ``templates/``.
        values: The values that the template uses. It escapes them, except SVG elements, which it marks as safe.

    Returns:
        The page as HTML, with its stylesheet inside.

    Raises:
        jinja2.UndefinedError: The template uses a value that is missing.
    """
    return _environment().get_template(template).render(values)


def render_report(
    body: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    recipe: str,
    similarity_maps: Sequence[SimilarityMap] = (),
    curves: Sequence[Curve] = (),
    planes: Sequence[Mapping[str, str]] = (),
    predictions: Sequence[Sequence[tuple[str, str]]] = (),
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """The report page of a run, as HTML.

    Args:
        body: The body of report.json.
        histories: Name of a training -> its epochs (``epoch``, ``loss``, and the task's figures and ``loss`` of the
            images that select an epoch).
        recipe: The recipe as YAML.
        similarity_maps: The method's similarity matrices.
        curves: The method's curves.
        planes: The lines of curves.csv.
        predictions: For each image a row of (caption, PNG in base64): the image and what each network finds in it.
        legend: (name, colour) of what is found.
    """
    task = tables.task_of(body)
    trainings = [
        (name, figures.curve_figure(epochs, task["primary"], task["titles"][task["primary"]]))
        for name, epochs in histories.items()
        if epochs
    ]
    if planes:
        title = "Every number of kept filters, one group at a time, not finetuned"
        trainings.append((title, figures.plane_figure(planes)))
    return render(
        "report.html.j2",
        body=body,
        recipe=recipe,
        metrics=(["", *tables.kinds_of(body)], [[label, *cells] for label, cells in tables.metric_rows(body)]),
        warnings=tables.warning_events(body),
        target=tables.target_text(body),
        timing=next(iter(body["dense"]["latency"].values())),
        groups=figures.svg(figures.groups_figure(body["plan"]["groups"])),
        trainings=_svgs(trainings),
        rounds=tables.records(body.get("rounds", [])),
        similarity_maps=[
            (similarity_map, figures.png(figures.similarity_image(similarity_map)))
            for similarity_map in similarity_maps
        ],
        curves=_svgs(figures.method_figures(curves)),
        figures=tables.records(body.get("table", [])),
        search=tables.search_text(body),
        searched=_svgs(search_figures(body.get("search") or {})),
        candidates=tables.candidates(body),
        criteria=tables.criteria(body),
        figure_name=tables.figure_name(body),
        predictions=predictions,
        legend=legend,
        seconds=", ".join(f"{name} {value:.1f} s" for name, value in body["timings"].items()),
        events="; ".join(map(tables.event_text, body["events"])) or "none",
        communication=tables.communication(body),
        traffic=tables.traffic_text(body),
        expanded="; ".join(f"{key} ({', '.join(names)})" for key, names in body.get("expanded", {}).items()),
    )


def _svgs(titled: Iterable[tuple[str, Figure]]) -> list[tuple[str, str]]:
    return [(title, figures.svg(figure)) for title, figure in titled]
