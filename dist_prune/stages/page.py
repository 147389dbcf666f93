"""The report as a table of text and as one self-contained HTML file."""

import base64
import html as escape
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dist_prune.pruning.portrait import Portrait

KINDS = ("dense", "pruned", "finetuned")
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
        ("macs", 1e6, "MACs (M)"),
        ("params", 1e3, "params (k)"),
        ("size_bytes", 1e3, "file (kB)"),
    ):
        dense = body["dense"][key]
        out.append((label, [_against(body[k][key], dense, unit) for k in KINDS]))
    if "sparse" in body["dense"]:
        out += _sparse_rows(body)
    for batch, first in body["dense"]["latency"].items():
        times = [body[k]["latency"][batch] for k in KINDS]
        out.append((f"ms, batch {batch}", [f"{t['ms']:.2f} ({t['ms'] / first['ms']:.2f}x)" for t in times]))
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
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", aim(body)])


def aim(body: Mapping[str, Any]) -> str:
    """Asked and achieved in one line."""
    achieved = ", ".join(f"{share:.1%} of the {name}" for name, share in body["achieved"].items())
    asked = ", ".join(f"{share:.1%} of the {name}" for name, share in body["target"].items())
    spec = body["recipe"]["finetune"]
    marked = (
        "; the kept epoch was SELECTED ON THE TEST IMAGES" if spec["selection"] == "test" and spec["epochs"] else ""
    )
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
) -> str:
    """One file without links: table, kept channels per group, curves, the method's portraits of groups, recipe."""
    e, environment = escape.escape, body["environment"]
    timing = body["dense"]["latency"]
    sample = next(iter(timing.values()))
    head = "".join(f"<th>{kind}</th>" for kind in KINDS)
    cells = "".join(f"<tr><td>{e(n)}</td>{''.join(f'<td>{e(c)}</td>' for c in cs)}</tr>" for n, cs in rows(body))
    groups = body["plan"]["groups"]
    listed = "".join(
        f"<tr><td><code>{e(g['name'])}</code></td><td>{g['width']}</td><td>{g['kept']}</td>"
        f"<td>{len(g['layers'])}</td><td class=why>{e(g['reason'])}</td></tr>"
        for g in groups
    )
    curves = "".join(f"<h2>{e(name)}</h2>{_svg(curve_figure(lines))}" for name, lines in histories.items() if lines)
    events = "; ".join(map(_event, body["events"])) or "none"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in body["timings"].items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{e(body['name'])}</title><style>{STYLE}</style>"
        f"<h1>{e(body['name'])}</h1><p class=sub>{e(body['recipe']['backbone']['name'])}, method "
        f"{e(body['recipe']['method']['name'])}, seed {body['seed']}, {body['world_size']} process(es), "
        f"{e(environment['processor'])}, commit {e(str(body['commit']))}</p>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{cells}</tbody></table>"
        f"<p class=sub>{e(aim(body))}. Times: median of {sample['repeats']} passes on {e(sample['device'])}, "
        f"{sample['threads']} thread(s), the three networks taking turns.</p>"
        f"<h2>Kept channels per group</h2>{_svg(groups_figure(groups))}{curves}"
        f"{_gallery(portraits)}{_rows(body.get('table', []))}"
        f"<h2>Groups</h2><table><thead><tr><th>group</th><th>width</th><th>kept</th><th>layers</th>"
        f"<th style='text-align:left'>why nothing was cut</th></tr></thead><tbody>{listed}</tbody></table>"
        f"<h2>Run</h2><p>{e(seconds)}. Events: {e(events)}. Plan <code>{body['plan']['fingerprint']}</code></p>"
        f"<h2>Recipe</h2><pre>{e(recipe)}</pre></html>"
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


def _rows(lines: Sequence[Mapping[str, float]]) -> str:
    """The method's own table: values of its knob, or rounds."""
    if not lines:
        return ""
    head = "".join(f"<th>{escape.escape(name)}</th>" for name in lines[0])
    cells = "".join(f"<tr>{''.join(f'<td>{value:.5g}</td>' for value in line.values())}</tr>" for line in lines)
    return f"<h2>The method's figures</h2><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def groups_figure(groups: Sequence[Mapping[str, Any]]) -> Figure:
    """A bar per group: kept of total; protected groups are grey."""
    figure = Figure(figsize=(10, max(2.2, min(0.2 * len(groups) + 1.1, 40))), layout="constrained")
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


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
