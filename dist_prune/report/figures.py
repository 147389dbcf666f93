"""Figures of reports: their common style, their embedding in pages, and the plots of a run's report."""

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dist_prune.pruning.figure_data import Curve, SimilarityMap

# Colours of templates/report.css.
INK = "#1d2733"
GREY = "#9aa5b1"
PALE = "#e3e8ee"
# Colours of clusters in the order of their number, repeated if there are more clusters.
_CLUSTERS = np.array(
    [
        [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189], [140, 86, 75], [227, 119, 194],
        [188, 189, 34], [23, 190, 207], [174, 199, 232], [255, 187, 120], [152, 223, 138],
    ],
    dtype=np.uint8,
)  # fmt: skip
_ALONE = np.array([210, 214, 220], dtype=np.uint8)
_DECLARATIONS = re.compile(r"\A\s*(?:<[?!][^>]*>\s*)*")
_PLANE = {
    "top1": "top-1 %",
    "ixz": "I(X;Z), bits",
    "izy": "I(Z;Y), bits",
    "total_correlation": "total correlation, bits",
}


def subplots(
    width: float, height: float, nrows: int = 1, ncols: int = 1, spines: Collection[str] = ("left", "bottom")
) -> tuple[Figure, np.ndarray]:
    """Create an empty figure in the style of all pages.

    Args:
        width: Width in inches.
        height: Height in inches.
        nrows: Rows of axes.
        ncols: Columns of axes.
        spines: Sides of the axes that get a line.

    Returns:
        The figure, and its axes as an object array (nrows, ncols).
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(nrows, ncols, squeeze=False)
    for panel in axes.flat:
        for side, spine in panel.spines.items():
            spine.set_visible(side in spines)
    return figure, axes


def svg(figure: Figure) -> str:
    """A figure as an SVG element, without the XML declarations of an SVG file."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return _DECLARATIONS.sub("", text.getvalue())


def png(pixels: np.ndarray) -> str:
    """Pixels (H, W, 3) uint8 as a PNG file in base64, for a ``data:`` address."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def similarity_image(similarity_map: SimilarityMap, side: int = 128) -> np.ndarray:
    """Draw the similarity matrix of a group's channels, clusters side by side.

    Args:
        similarity_map: Similarities, clusters and kept channels of C channels.
        side: Largest number of cells along a side; a cell is the mean of its channels.

    Returns:
        (h, w, 3) uint8, h = min(C, side). Dark cells are similar. To their left are the clusters' colours and, dark,
        the channels that are kept.
    """
    of = similarity_map.clusters
    order = np.lexsort((~similarity_map.kept, np.where(of < 0, len(of), of)))
    cells = min(side, len(order))
    starts = np.linspace(0, len(order), cells, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(order)))
    sums = np.add.reduceat(similarity_map.similarity[np.ix_(order, order)], starts, axis=0)
    mean = np.add.reduceat(sums, starts, axis=1) / (counts[:, None] * counts[None, :])
    grey = (255 * (1 - np.clip(2 * mean - 1, 0, 1))).astype(np.uint8)  # random bits agree by a half: white
    inner = np.repeat(grey[:, :, None], 3, axis=2)
    clusters = similarity_map.clusters[order[starts]]  # a cell has the colour of its first channel
    colour = np.where(clusters[:, None] < 0, _ALONE, _CLUSTERS[clusters % len(_CLUSTERS)])
    share = np.add.reduceat(similarity_map.kept[order].astype(float), starts) / counts
    kept_strip = np.repeat((255 - 220 * share).astype(np.uint8)[:, None], 3, axis=1)
    width = max(2, cells // 16)
    strips = [np.repeat(strip[:, None], width, axis=1) for strip in (colour, kept_strip)]
    return np.concatenate([*strips, inner], axis=1)


def groups_figure(groups: Sequence[Mapping[str, Any]], width: float = 10) -> Figure:
    """Plot a bar per group with its kept and removed channels; groups that nothing was cut from are grey.

    Args:
        groups: The groups of report.json: ``name``, ``width``, ``kept``, ``reason``.
        width: Width in inches.
    """
    figure, panels = subplots(width, max(2.2, min(0.2 * len(groups) + 1.1, 40)))
    axes = panels[0, 0]
    positions = range(len(groups))
    widths, kept = [g["width"] for g in groups], [g["kept"] for g in groups]
    colours = [GREY if g["reason"] else "#1f77b4" for g in groups]
    axes.barh(positions, widths, color=PALE)
    axes.barh(positions, kept, color=colours)
    for position, (width_total, kept_count) in enumerate(zip(widths, kept, strict=True)):
        axes.text(width_total, position, f" {kept_count}/{width_total}", va="center", fontsize=7)
    axes.set_yticks(list(positions), [g["name"] for g in groups], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("channels (blue: kept, grey: kept whole, light: removed)")
    axes.margins(x=0.08, y=0.01)
    return figure


def curve_figure(lines: Sequence[Mapping[str, float]], primary: str, title: str) -> Figure:
    """Plot the loss and the primary figure over epochs.

    Args:
        lines: The history of a training: ``epoch`` and ``loss``, and ``<split>_<primary>`` and ``<split>_loss`` for
            the epochs that were evaluated.
        primary: the task's figure that selects epochs.
        title: its name with its unit.
    """
    figure, panels = subplots(10, 3, ncols=2)
    loss_axes, accuracy_axes = panels[0]
    epochs = [line["epoch"] for line in lines]
    loss_axes.plot(epochs, [line["loss"] for line in lines], marker="o", markersize=3, label="training images")
    ending = f"_{primary}"
    split = next((k.removesuffix(ending) for line in lines for k in line if k.endswith(ending)), "test")
    tested = [line for line in lines if split + ending in line]
    tested_epochs = [line["epoch"] for line in tested]
    loss_axes.plot(
        tested_epochs, [line[f"{split}_loss"] for line in tested], marker="o", markersize=3, label=f"{split} images"
    )
    accuracy_axes.plot(
        tested_epochs, [line[split + ending] for line in tested], marker="o", markersize=3, color="#ff7f0e"
    )
    loss_axes.set_ylabel("cross-entropy" if primary == "top1" else "loss")
    accuracy_axes.set_ylabel(f"{split} {title}")
    loss_axes.legend(frameon=False)
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def method_figures(lines: Sequence[Curve]) -> list[tuple[str, Figure]]:
    """Plot the method's curves, one figure for each pair of axis labels.

    Returns:
        (label of the y axis, figure) pairs.
    """
    titled = []
    for labels in dict.fromkeys(line.axes for line in lines):
        figure, panels = subplots(10, 3.4)
        axes = panels[0, 0]
        same_axes = [line for line in lines if line.axes == labels]
        for line in same_axes:
            axes.plot(line.x, line.y, marker="o", markersize=3, linewidth=1, label=line.group)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if len(same_axes) <= 16:
            axes.legend(frameon=False, fontsize=7, ncols=2)
        titled.append((labels[1], figure))
    return titled


def plane_figure(lines: Sequence[Mapping[str, str]]) -> Figure:
    """Plot top-1 and information against the share of kept filters: a line per group, axes per measured column.

    Args:
        lines: The lines of curves.csv.
    """
    columns = [key for key in _PLANE if any(line[key] for line in lines)]
    figure, panels = subplots(10, 3.2 * -(-len(columns) // 2), -(-len(columns) // 2), min(2, len(columns)))
    for axes, key in zip(panels.flat, columns, strict=False):
        for group in dict.fromkeys(line["group"] for line in lines):
            group_lines = [line for line in lines if line["group"] == group and line[key]]
            shares = [int(line["kept"]) / int(line["width"]) for line in group_lines]
            axes.plot(shares, [float(line[key]) for line in group_lines], marker=".", markersize=3, label=group)
        axes.set(xlabel="share of the filters kept", ylabel=_PLANE[key])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return figure
