"""The page of ``dist-prune ratio-curves``: the curves, a heat map of the accuracy lost, the table."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from dist_prune.report.figures import INK, subplots, svg
from dist_prune.report.html import render

NAMED = 10  # number of groups with a colour and a name in the plot; the others are grey


def render_ratio_curves(name: str, method: str, body: Mapping[str, Any], suggestion: str) -> str:
    """The page as HTML.

    Args:
        name: Name of the recipe.
        method: Name of the method.
        body: The body of ratio_curves.json.
        suggestion: The suggested keep ratios, as ``key=value`` for a command line.
    """
    return render(
        "ratio_curves.html.j2",
        name=name,
        method=method,
        body=body,
        suggestion=suggestion,
        lines=svg(lines_figure(body)),
        map=svg(map_figure(body)),
    )


def lines_figure(body: Mapping[str, Any]) -> Figure:
    """Plot top-1 and loss against the keep ratio: a line per group, the most sensitive ones named, dense dashed.

    Top-1 of repaired networks is dotted.

    Args:
        body: The body of ratio_curves.json.
    """
    figure, panels = subplots(10, 4, ncols=2)
    groups = body["groups"]
    for axes, key, label in zip(panels[0], ("top1", "loss"), ("top-1 %", "cross-entropy"), strict=True):
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
            if key == "top1" and named and group["points"][0].get("repaired") is not None:
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


def map_figure(body: Mapping[str, Any]) -> Figure:
    """Plot the points of top-1 lost as a heat map: a row per group, most sensitive first, and a column per ratio.

    Args:
        body: The body of ratio_curves.json.
    """
    groups = body["groups"]
    drops = [[body["dense"]["top1"] - point["top1"] for point in group["points"]] for group in groups]
    figure, panels = subplots(7, max(1.6, 0.22 * len(drops) + 0.9), spines=())
    axes = panels[0, 0]
    largest = max(1.0, *(value for values in drops for value in values))
    axes.imshow(drops, cmap="Oranges", vmin=0, vmax=largest, aspect="auto")
    for row, values in enumerate(drops):
        for column, value in enumerate(values):
            colour = "white" if value > 0.6 * largest else INK
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(drops)), [group["group"] for group in groups], fontsize=7)
    axes.set_xticks(range(len(drops[0])), [f"{point['ratio']:g}" for point in groups[0]["points"]], fontsize=7)
    axes.set_xlabel("share of the group's channels kept")
    return figure
