"""Figures as pixels: TensorBoard's plots, similarity matrices, PNG files inside pages. Pages draw plots by plots.py."""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dist_prune.pruning.figure_data import SimilarityMap
from dist_prune.report.tables import loss_title, task_of
from dist_prune.tasks.primary import PrimaryFigure

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
NAMED = 10  # number of groups with a colour and a name in the plot of ratio curves; the others are grey


def subplots(
    width: float, height: float, nrows: int = 1, ncols: int = 1, spines: Collection[str] = ("left", "bottom")
) -> tuple[Figure, np.ndarray]:
    """Create an empty figure.

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


def png(pixels: np.ndarray, side: int | None = None) -> str:
    """Pixels as a PNG file in base64, for a ``data:`` address.

    Args:
        pixels: (H, W, 3) uint8.
        side: Longest side of the image, which larger ones are reduced to; None: any.
    """
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if side is not None:
        image.thumbnail((side, side))
    image.save(file, "PNG")
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


def lines_figure(body: Mapping[str, Any]) -> Figure:
    """Plot figure and loss against the keep ratio: a line per group, the most sensitive ones named, dense dashed.

    The figure of repaired networks is dotted.

    Args:
        body: The body of ratio_curves.json.
    """
    figure, panels = subplots(10, 4, ncols=2)
    groups = body["groups"]
    primary = PrimaryFigure.of(task_of(body))
    titles = (primary.axis_title, loss_title(primary.key))
    for axes, key, label in zip(panels[0], (primary.key, "loss"), titles, strict=True):
        dense = body["dense"][key]
        for rank, group in reversed(list(enumerate(groups))):
            named = rank < NAMED
            axes.plot(
                [1.0, *(point["ratio"] for point in group["points"])],
                [dense, *(p[key] for p in group["points"])],
                marker="o",
                markersize=3,
                linewidth=1.2 if named else 0.8,
                color=f"C{rank}" if named else "#c3cad2",
                label=group["group"] if named else None,
                zorder=3 if named else 1,
            )
            if key == primary.key and named and group["points"][0].get("repaired") is not None:
                axes.plot(
                    [1.0, *(point["ratio"] for point in group["points"])],
                    [dense, *(point["repaired"] for point in group["points"])],
                    linestyle=":",
                    linewidth=1.2,
                    color=f"C{rank}",
                    zorder=3,
                    gid="repaired",
                )
        axes.axhline(dense, color=INK, linewidth=0.9, linestyle="--", label="dense")
        axes.set(xlabel="share of the group's channels kept", ylabel=label)
        axes.invert_xaxis()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = [labels.index("dense"), *(labels.index(group["group"]) for group in groups[:NAMED])]
    unnamed = len(groups) - NAMED
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside right upper",
        frameon=False,
        fontsize=7,
        title="most sensitive first" + (f",\n{unnamed} more in grey" if unnamed > 0 else ""),
        title_fontsize=7,
    )
    return figure
