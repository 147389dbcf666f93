"""The report as a table of text and as one self-contained HTML file."""

import base64
import html as escape
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dist_prune.pruning.cost import tabled
from dist_prune.pruning.portrait import Curve, Portrait
from dist_prune.recipe import peeks
from dist_prune.runtime.spread import faster

KINDS = ("dense", "pruned", "finetuned")
ROUNDS = "Rounds: shares of the dense network, top-1 after cutting and after finetuning"
FIGURES = "The method's figures"
REDUCED = ("sum", "max", "min", "rows", "gradients")  # collectives whose payload is reduced; others are copied
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;max-width:1040px;margin:32px auto;padding:0 20px}
h1{font-size:24px;margin-bottom:2px}h2{font-size:17px;margin-top:34px}p.sub{color:#5b6875;margin-top:0}
table{border-collapse:collapse;width:100%}th,td{padding:6px 10px;text-align:right;border-bottom:1px solid #e3e8ee}
th:first-child,td:first-child{text-align:left}
thead th{border-bottom:2px solid #1d2733}td.why{text-align:left;color:#5b6875}
pre{background:#f5f7f9;padding:14px;overflow:auto;font-size:13px}svg{max-width:100%;height:auto}code{font-size:13px}
.gallery{display:flex;flex-wrap:wrap;gap:14px}figure{margin:0;width:186px;font-size:12px;color:#5b6875}
figure img{width:100%;image-rendering:pixelated;border:1px solid #e3e8ee}
"""


def rows(body: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, one cell each for dense, pruned, finetuned)."""
    out = [
        ("top-1 %", [f"{body[k]['top1']:.2f}" for k in KINDS]),
        ("top-5 %", [f"{body[k]['top5']:.2f}" for k in KINDS]),
    ]
    out.append(("loss", [_loss(body[k]["loss"]) for k in KINDS]))
    for key, unit, label in (
        *((c.name, c.divisor, c.label) for c in tabled() if c.name in body["dense"]),
        ("size_bytes", 1e3, "file (kB)"),
    ):
        dense = body["dense"][key]
        out.append((label, [_against(body[k][key], dense, unit) for k in KINDS]))
    if "sparse" in body["dense"]:
        out += _sparse_rows(body)
    for batch, first in body["dense"]["latency"].items():
        times = [body[k]["latency"][batch] for k in KINDS]
        out.append((f"ms, batch {batch}", [f"{t['ms']:.2f}" for t in times]))
        out.append((f"speed-up, batch {batch}", ["", *(faster(first, t) for t in times[1:])]))
        out.append((f"images/s, batch {batch}", [f"{t['images_per_s']:.0f}" for t in times]))
    return out


def _sparse_rows(body: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What block masks change: weights left, files of sparse matrices, MACs of weights that no mask holds at zero."""
    found = [body[k]["sparse"] for k in KINDS]
    return [
        ("weights pruned %", [f"{s['pruned_percent']:.2f}" for s in found]),
        ("CSR file (MiB)", [f"{s['csr_bytes'] / 2**20:.3f}" for s in found]),
        ("dense weights (MiB)", [f"{s['dense_bytes'] / 2**20:.3f}" for s in found]),
        ("MACs not on masked zeros (M)", [_against(s["masked_macs"], found[0]["masked_macs"], 1e6) for s in found]),
    ]


def _unit(group: Mapping[str, Any]) -> str:
    """What the channels of a group are, where they are whole heads or conv groups."""
    return "" if group.get("unit", "channel") == "channel" else f" {group['unit']}s"


def warned(body: Mapping[str, Any]) -> list[str]:
    """What nobody must miss: events that begin so."""
    return [str(event["event"]) for event in body.get("events", []) if str(event["event"]).startswith("WARNING")]


def _event(event: Mapping[str, Any]) -> str:
    more = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("stage", "event"))
    return f"{event['stage']}: {event['event']}" + (f" ({more})" if more else "")


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _against(value: float, dense: float, unit: float) -> str:
    change = f" ({100 * (value / dense - 1):+.1f} %)" if value != dense else ""
    return f"{value / unit:,.2f}{change}"


def table(body: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    lines = [("", list(KINDS)), *rows(body)]
    widths = [max(len(line[0]) for line in lines)] + [max(len(cells[i]) for _, cells in lines) for i in range(3)]
    text = [
        "  ".join([label.ljust(widths[0]), *(cell.rjust(widths[i + 1]) for i, cell in enumerate(cells))])
        for label, cells in lines
    ]
    more = [*_rounds(body.get("rounds", [])), *filter(None, [said(body)]), *warned(body)]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", aim(body), *more])


def _rounds(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of text a round."""
    return [
        f"round {line['round']}: {', '.join(f'{line[c.name]:.1%} of the {c.name}' for c in tabled() if c.name in line)}"
        f", top-1 {line['pruned_top1']:.2f} % cut, {line['finetuned_top1']:.2f} % after {line['epochs']} epochs"
        for line in lines
    ]


def said(body: Mapping[str, Any]) -> str:
    """Bytes that each rank handed to collectives, stage by stage; nothing for a single process."""
    parts = []
    for stage, words in (body.get("communication") or {}).items():
        reduced = sum(count["bytes"] for word, count in words.items() if word in REDUCED)
        rest = sum(count["bytes"] for word, count in words.items() if word not in REDUCED)
        if reduced + rest >= 1000:
            parts.append(f"{stage} {_size(reduced)} + {_size(rest)}")
    who = f"{body['recipe']['method']['name']} on {body['recipe']['backbone']['name']}"
    return f"communication of each rank ({who}), all-reduced + other: {', '.join(parts)}" if parts else ""


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def aim(body: Mapping[str, Any]) -> str:
    """Asked and achieved in one line."""
    achieved = ", ".join(f"{share:.1%} of the {name}" for name, share in body["achieved"].items())
    asked = ", ".join(f"{share:.1%} of the {name}" for name, share in body["target"].items())
    marked = "".join(f"; {peek.upper()}" for peek in peeks(body["recipe"]))
    blocks = "; masked blocks of weights save MACs on paper only: they run as slow as dense ones"
    runs = body.get("reruns")
    spread = f"; {len(runs['top1'])} finetunings: {runs['mean']:.2f} ± {runs['std']:.2f} %" if runs else ""
    masked = blocks if "sparse" in body["dense"] else ""
    return f"kept: {achieved}" + (f" (asked: at most {asked})" if asked else "") + masked + spread + marked


def html(
    body: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    recipe: str,
    portraits: Sequence[Portrait] = (),
    lines: Sequence[Curve] = (),
    figures: Mapping[str, Figure] | None = None,
) -> str:
    """One file without links: table, kept channels per group, curves, the method's portraits and curves, recipe."""
    e, environment = escape.escape, body["environment"]
    timing = body["dense"]["latency"]
    sample = next(iter(timing.values()))
    head = "".join(f"<th>{kind}</th>" for kind in KINDS)
    cells = "".join(f"<tr><td>{e(n)}</td>{''.join(f'<td>{e(c)}</td>' for c in cs)}</tr>" for n, cs in rows(body))
    groups = body["plan"]["groups"]
    listed = "".join(
        f"<tr><td><code>{e(g['name'])}</code></td><td>{g['width']}{_unit(g)}</td><td>{g['kept']}</td>"
        f"<td>{len(g['layers'])}</td><td class=why>{e(g['reason'])}</td></tr>"
        for g in groups
    )
    curves = "".join(f"<h2>{e(name)}</h2>{_svg(curve_figure(lines))}" for name, lines in histories.items() if lines)
    curves += "".join(f"<h2>{e(name)}</h2>{_svg(figure)}" for name, figure in (figures or {}).items())
    events = "; ".join(map(_event, body["events"])) or "none"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in body["timings"].items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{e(body['name'])}</title><style>{STYLE}</style>"
        f"<h1>{e(body['name'])}</h1><p class=sub>{e(body['recipe']['backbone']['name'])}, method "
        f"{e(body['recipe']['method']['name'])}, seed {body['seed']}, {body['world_size']} process(es), "
        f"{e(environment['processor'])}, commit {e(str(body['commit']))}</p>"
        f"{''.join(f'<p><b>{e(text)}</b></p>' for text in warned(body))}"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{cells}</tbody></table>"
        f"<p class=sub>{e(aim(body))}. Times: median of {sample['repeats']} passes on {e(sample['device'])}, "
        f"{sample['threads']} thread(s), the three networks taking turns. A speed-up above 1x is faster than dense; "
        f"it is not reliable where the times show that other work had the machine.</p>"
        f"<h2>Kept channels per group</h2>{_svg(groups_figure(groups))}{curves}"
        f"{_rows(ROUNDS, body.get('rounds', []))}{_gallery(portraits)}{_curves(lines)}"
        f"{_rows(FIGURES, body.get('table', []))}{_many(body.get('many', []), body.get('many_images') or '')}"
        f"<h2>Groups</h2><table><thead><tr><th>group</th><th>width</th><th>kept</th><th>layers</th>"
        f"<th style='text-align:left'>why nothing was cut</th></tr></thead><tbody>{listed}</tbody></table>"
        f"<h2>Run</h2><p>{e(seconds)}. Events: {e(events)}. Plan <code>{body['plan']['fingerprint']}</code></p>"
        f"{_spoken(body)}"
        f"<h2>Recipe</h2>{_filled(body)}<pre>{e(recipe)}</pre></html>"
    )


def _filled(body: Mapping[str, Any]) -> str:
    """Which values the environment gave; the values themselves stand in no report."""
    said = "; ".join(f"{key} ({', '.join(names)})" for key, names in body.get("expanded", {}).items())
    return f"<p class=sub>Filled in from the environment: {escape.escape(said)}.</p>" if said else ""


def _spoken(body: Mapping[str, Any]) -> str:
    """The communication of each stage, collective by collective."""
    lines = [
        f"<tr><td>{stage}</td><td>{word}</td><td>{count['calls']:,}</td><td>{count['bytes']:,}</td></tr>"
        for stage, words in (body.get("communication") or {}).items()
        for word, count in words.items()
    ]
    head = "<table><thead><tr><th>stage</th><th>collective</th><th>calls</th><th>bytes</th></tr></thead><tbody>"
    note = f"<p class=sub>{escape.escape(said(body))}.</p>"
    more = f"<details><summary>by collective</summary>{head}{''.join(lines)}</tbody></table></details>"
    return f"<h2>What each rank said</h2>{note}{more}" if lines else ""


def _many(table: Sequence[Mapping[str, Any]], images: str) -> str:
    """The criteria of ``score.many``: accuracy after surgery, size, and what each two keep in common."""
    if not table:
        return ""
    names, costs = [escape.escape(row["method"]) for row in table], [c for c in tabled() if c.name in table[0]]
    lines = "".join(
        f"<tr><td>{name}</td><td>{row['top1']:.2f}</td>"
        + "".join(f"<td>{row[c.name]:.1%}</td>" for c in costs)
        + "".join(f"<td>{share:.2f}</td>" for share in row["overlap"].values())
        + "</tr>"
        for name, row in zip(names, table, strict=True)
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "top-1 %", *(c.title for c in costs), *names))
    return (
        "<h2>Criteria at the same target, nothing finetuned</h2><p class=sub>Columns of names: kept channels that both "
        f"keep, of those that either keeps. Top-1 is that on {escape.escape(images)}.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _gallery(portraits: Sequence[Portrait]) -> str:
    """A small picture per group: the likeness of its channels, clustered."""
    if not portraits:
        return ""
    shown = "".join(
        f"<figure><img alt='{escape.escape(p.group)}' src='data:image/png;base64,{_png(p.picture())}'>"
        f"<figcaption><code>{escape.escape(p.group)}</code><br>{escape.escape(p.said)}</figcaption></figure>"
        for p in portraits
    )
    return (
        "<h2>Who is like whom</h2><p class=sub>Channels of a cluster stand side by side; dark: alike. Left strip: the "
        f"cluster (grey: none); beside it, dark: the channel stays.</p><div class=gallery>{shown}</div>"
    )


def _curves(lines: Sequence[Curve]) -> str:
    """The method's curves, a plot for each pair of axes."""
    plots = []
    for axes in dict.fromkeys(line.axes for line in lines):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        plot = figure.subplots()
        chosen = [line for line in lines if line.axes == axes]
        for line in chosen:
            plot.plot(line.x, line.y, marker="o", markersize=3, linewidth=1, label=line.group)
        plot.set_xlabel(axes[0])
        plot.set_ylabel(axes[1])
        if len(chosen) <= 16:
            plot.legend(frameon=False, fontsize=7, ncols=2)
        for side in ("top", "right"):
            plot.spines[side].set_visible(False)
        plots.append(f"<h2>{escape.escape(axes[1])}</h2>{_svg(figure)}")
    return "".join(plots)


def _rows(title: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """The rounds, or the method's own table: values of its knob, or groups; rows may lack what others have."""
    if not lines:
        return ""
    names = list(dict.fromkeys(name for line in lines for name in line))
    head = "".join(f"<th>{escape.escape(name)}</th>" for name in names)
    cells = "".join(f"<tr>{''.join(f'<td>{_cell(line.get(name))}</td>' for name in names)}</tr>" for line in lines)
    return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, int | float) else escape.escape(str(value))


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def groups_figure(groups: Sequence[Mapping[str, Any]], width: float = 10) -> Figure:
    """A bar per group: kept of total; protected groups are grey. ``width`` in inches."""
    figure = Figure(figsize=(width, max(2.2, min(0.2 * len(groups) + 1.1, 40))), layout="constrained")
    axes = figure.subplots()
    places = range(len(groups))
    widths, kept = [g["width"] for g in groups], [g["kept"] for g in groups]
    colours = ["#9aa5b1" if g["reason"] else "#1f77b4" for g in groups]
    axes.barh(places, widths, color="#e3e8ee")
    axes.barh(places, kept, color=colours)
    for place, (all_, left) in enumerate(zip(widths, kept, strict=True)):
        axes.text(all_, place, f" {left}/{all_}", va="center", fontsize=7)
    axes.set_yticks(list(places), [g["name"] for g in groups], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("channels (blue: kept, grey: kept whole, light: removed)")
    axes.margins(x=0.08, y=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def curve_figure(lines: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and top-1 over epochs."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in lines]
    left.plot(epochs, [line["loss"] for line in lines], marker="o", markersize=3, label="training images")
    judged = next((k.removesuffix("_top1") for line in lines for k in line if k.endswith("_top1")), "test")
    tested = [line for line in lines if f"{judged}_top1" in line]
    at = [line["epoch"] for line in tested]
    left.plot(at, [line[f"{judged}_loss"] for line in tested], marker="o", markersize=3, label=f"{judged} images")
    right.plot(at, [line[f"{judged}_top1"] for line in tested], marker="o", markersize=3, color="#ff7f0e")
    left.set_ylabel("cross-entropy")
    right.set_ylabel(f"{judged} top-1 %")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def plane_figure(lines: Sequence[Mapping[str, str]]) -> Figure:
    """Top-1 and information against the share of kept filters: a line per group, a panel per figure that is there."""
    names = {
        "top1": "top-1 %",
        "ixz": "I(X;Z), bits",
        "izy": "I(Z;Y), bits",
        "total_correlation": "total correlation, bits",
    }
    there = [key for key in names if any(line[key] for line in lines)]
    figure = Figure(figsize=(10, 3.2 * -(-len(there) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(there) // 2), min(2, len(there)), squeeze=False).flat
    for axes, key in zip(panels, there, strict=False):
        for group in dict.fromkeys(line["group"] for line in lines):
            own = [line for line in lines if line["group"] == group and line[key]]
            shares = [int(line["kept"]) / int(line["width"]) for line in own]
            axes.plot(shares, [float(line[key]) for line in own], marker=".", markersize=3, label=group)
        axes.set(xlabel="share of the filters kept", ylabel=names[key])
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
