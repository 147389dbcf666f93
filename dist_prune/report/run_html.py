"""The report page of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.report import answers, criteria_tables, figures, headline, network_picture, run_plots, tables
from dist_prune.report.html import render
from dist_prune.report.search_plots import search_figures

MOST_CLASSES = 1000  # rows of the table of classes


@dataclass(frozen=True)
class Exhibits:
    """What a report shows beside its body; all of it may be absent.

    Attributes:
        histories: name of a training -> its epochs (``epoch``, ``loss``, and the task's figures and ``loss`` of the
            images that select an epoch).
        similarity_maps: the method's similarity matrices.
        curves: the method's curves.
        planes: the lines of curves.csv.
        predictions: for each image a row of (caption, PNG in base64): the image and what each network finds in it.
        legend: (name, colour) of what is found.
        examples: number of a class -> (caption, PNG in base64) of images that only the dense network gets right.
        confusion: network -> (classes, classes) images by class and predicted class, of few classes.
        classes: names of the classes, for ``confusion``.
    """

    histories: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    similarity_maps: Sequence[SimilarityMap] = ()
    curves: Sequence[Curve] = ()
    planes: Sequence[Mapping[str, str]] = ()
    predictions: Sequence[Sequence[tuple[str, str]]] = ()
    legend: Sequence[tuple[str, str]] = ()
    examples: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    confusion: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()


def render_report(body: Mapping[str, Any], recipe: str, exhibits: Exhibits | None = None) -> str:
    """The report page of a run, as HTML.

    Args:
        body: The body of report.json.
        recipe: The recipe as YAML.
        exhibits: What else the page shows.
    """
    shown = exhibits or Exhibits()
    layers = network_picture.layers_of(body)
    return render(
        "report.html.j2",
        body=body,
        recipe=recipe,
        shown=shown,
        sentences=headline.verdict(body),
        cards=headline.cards(body),
        left_alone=network_picture.left_alone(body["plan"]["groups"]),
        metrics=(["", *tables.kinds_of(body)], [[label, *cells] for label, cells in tables.metric_rows(body, True)]),
        target=tables.target_text(body),
        timing=next(iter(body["dense"]["latency"].values())),
        picture=network_picture.picture(layers),
        layers=network_picture.layer_rows(layers),
        groups=sorted(body["plan"]["groups"], key=lambda group: not group["reason"]),
        lost=_lost(body, shown),
        class_table=_class_table(body),
        confused=tables.records([{k.replace("_", " "): v for k, v in one.items()} for one in body.get("confused", [])]),
        commit=_short(body["commit"]),
        confusion=_confusion(shown),
        bins=answers.BINS,
        calibration=run_plots.calibration_figure(body.get("calibration") or {}),
        trainings=run_plots.training_figures(shown.histories, tables.task_of(body))
        + run_plots.plane_figures(shown.planes, tables.task_of(body)),
        rounds=tables.records(body.get("rounds", [])),
        similarity_maps=[(one, figures.png(figures.similarity_image(one))) for one in shown.similarity_maps],
        curves=run_plots.method_figures(shown.curves),
        figures=tables.records(body.get("table", [])),
        search=tables.search_text(body),
        searched=search_figures(body.get("search") or {}),
        search_groups=(body.get("search") or {}).get("groups") or [],
        candidates=tables.candidates(body),
        criteria=criteria_tables.table_of_report(body),
        criteria_overlap=criteria_tables.criteria_overlap(body.get("many", [])),
        figure_name=tables.figure_name(body),
        seconds=", ".join(f"{name} {value:.1f} s" for name, value in body["timings"].items()),
        events=[tables.event_text(event) for event in body["events"]],
        communication=tables.communication(body),
        traffic=tables.traffic_text(body),
        expanded="; ".join(f"{key} ({', '.join(names)})" for key, names in body.get("expanded", {}).items()),
    )


def _short(commit: str | None) -> str:
    """A commit of git, short enough for a line."""
    return re.sub(r"\A([0-9a-f]{12})[0-9a-f]{28}", r"\1", commit or "unknown")


def _lost(body: Mapping[str, Any], shown: Exhibits) -> list[dict[str, Any]]:
    """The classes that lost most: name, figures before and after, and images."""
    unit = "" if any("images" in line for line in body.get("classes", [])) else " IoU"
    out = []
    for line in answers.losers(body.get("classes", [])):
        of = (lambda value, n=line["images"]: 100 * value / n) if "images" in line else float
        text = f"{of(line['dense']):.1f} → {of(line['finetuned']):.1f} %{unit}"
        size = f"{line['images']:,} images" if "images" in line else f"{line['pixels']:,} pixels"
        out.append(
            {"name": line["class"], "text": text, "drop": f"{answers.drop(line):.1f} points less", "size": size}
            | {"images": shown.examples.get(line["number"], ())}
        )
    return out


def _class_table(body: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Each class with its figure of each network; of very many classes those that changed most."""
    lines = body.get("classes", [])
    if not lines:
        return None
    if len(lines) > MOST_CLASSES:
        lines = sorted(lines, key=lambda line: -abs(answers.drop(line)))[:MOST_CLASSES]
    kinds = [kind for kind in tables.KINDS if kind in lines[0]]
    size = "images" if "images" in lines[0] else "pixels"
    rows = []
    for line in lines:
        values = [100 * line[kind] / line["images"] if size == "images" else line[kind] for kind in kinds]
        rows.append(
            [line["class"], f"{line[size]:,}", *(f"{value:.1f}" for value in values), f"{values[-1] - values[0]:+.1f}"]
        )
    figure = "right %" if size == "images" else "IoU %"
    return ["class", size, *(f"{kind}, {figure}" for kind in kinds), "change, points"], rows


def _confusion(shown: Exhibits) -> list[dict[str, Any]]:
    """Confusion matrices for the template: each cell with its share of the row's images."""
    out = []
    for kind, table in shown.confusion.items():
        rows = []
        for name, row in zip(shown.classes, table.tolist(), strict=True):
            total = max(1, sum(row))
            rows.append((name, [(count, count / total) for count in row]))
        out.append({"kind": kind, "rows": rows})
    return out
