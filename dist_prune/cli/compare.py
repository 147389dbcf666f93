"""``dist-prune compare``: many runs as one table (CSV, Markdown) and one page with Pareto plots, papers beside them."""

import argparse
import csv
import html as escape
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_prune import safe_parsing
from dist_prune.config import loading
from dist_prune.config.compatibility import rename_old_keys
from dist_prune.config.recipe import selected_on_test
from dist_prune.errors import PruneError, shown
from dist_prune.fileio import canonical, write_atomic
from dist_prune.pipeline.ledger import flatten
from dist_prune.pruning.selection.cost import report_costs
from dist_prune.training.timing_noise import DOUBTFUL, is_reliable

# a row of the table in a recipe's header: which one, top-1 drop (/ top-5 drop), change of FLOPs and parameters (- where
# the paper does not say); the columns are two blanks apart
PAPER_ROW = re.compile(
    r"^#\s+(\S+(?: \S+)*)\s{2,}(-?[\d.]+)(?:\s*/\s*-?[\d.]+)?\s+(?:(-[\d.]+) %|-)\s+(?:(-[\d.]+) %|-)(?:\s|$)"
)
PAPER_HEAD = re.compile(r"^#\s+(\S+(?: \S+)*)\s{2,}top-1\S* drop\s+FLOPs\s+parameters")
COLUMNS = {
    "run": "run", "seeds": "seeds", "backbone": "backbone", "method": "method", "dense_top1": "dense top-1 %",
    "pruned_top1": "pruned top-1 %", "top1": "top-1 %", "top1_std": "std", "change": "change, points",
}  # fmt: skip
TIMES = {"ms": "ms", "speedup": "speed-up", "timed": "measured times", "marked": ""}


def columns() -> dict[str, str]:
    """Key of a row -> head of its column: accuracy, an amount and a share of each cost, measured times."""
    costs = {key: head for cost in report_costs() for key, head in (
        (cost.name, cost.label), (f"{cost.name}_share", f"{cost.title} kept"))}  # fmt: skip
    return COLUMNS | costs | TIMES


@dataclass(frozen=True)
class Comparison:
    """What was found under the folders given: finished runs' reports, papers' points, unfinished runs' reasons."""

    rows: list[dict[str, Any]]
    papers: list[dict[str, Any]]
    unfinished: list[dict[str, str]]
    batch: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("runs", nargs="+", help="run directories, or folders of them (a sweep's runs/NAME)")
    parser.add_argument("--out", metavar="FOLDER", help="write compare.csv, compare.md and compare.html there")
    parser.add_argument("--batch", help="the batch size whose latency is compared (default: the largest all runs have)")


def run(given: argparse.Namespace) -> tuple[str, Any, int]:
    """Compare, print the Markdown table, write the files where asked."""
    found = collect([Path(run) for run in given.runs], given.batch)
    text = markdown(found)
    if given.out:
        from dist_prune.report.compare_html import render_comparison

        folder = Path(given.out)
        write_atomic(folder / "compare.csv", as_csv(found))
        write_atomic(folder / "compare.md", text)
        write_atomic(
            folder / "compare.html",
            render_comparison(
                "comparison of " + ", ".join(given.runs), tables(found), found.rows, found.papers, found.batch
            ),
        )
        text += f"\n{folder / 'compare.html'}"
    return text, {"runs": found.rows, "paper": found.papers, "unfinished": found.unfinished}, 0


def collect(places: Sequence[Path], batch: str | None = None) -> Comparison:
    """Read reports, put seeds of the same recipe together.

    Args:
        places: run directories or folders that hold some.
        batch: the batch size whose latency is compared.

    Raises:
        PruneError: there is no run, or no run was timed at that batch size.
    """
    folders = sorted({folder for place in places for folder in _runs(place)})
    if not folders:
        raise PruneError(f"no run directory (a folder with a recipe.yaml) in {', '.join(map(str, places))}")
    reports, unfinished = [], []
    for folder in folders:
        old = _superseded(folder)
        if old:
            unfinished.append({"run": folder.name, "why": old})
            continue
        if not (folder / "report.json").exists():
            unfinished.append({"run": folder.name, "why": _why(folder)})
            continue
        try:
            reports.append(_report(folder))
        except PruneError as error:
            unfinished.append({"run": folder.name, "why": str(error)})
    timed = [set(report["dense"]["latency"]) for report in reports]
    common = set.intersection(*timed) if timed else set()
    if reports and (not common or (batch is not None and batch not in common)):
        raise PruneError(
            f"no latency at batch {batch or 'of any one size'} in all runs; all have "
            f"{', '.join(sorted(common)) or 'none'} (the recipes' report.latency_batches)"
        )
    batch = batch or max(common, key=int, default="1")
    groups: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        keys = {key: value for key, value in report["recipe"].items() if key not in ("seed", "name", "cluster")}
        keys = rename_old_keys(flatten(keys))  # a run of an older version is a seed of the same recipe
        groups.setdefault(canonical(keys), []).append(report)
    rows = [_row(group, batch) for group in groups.values()]
    if len({place for row in rows for place in row["places"]}) > 1:  # each row tells of which machine its times are
        for row in rows:
            row["timed"] = "; ".join(filter(None, [row["timed"], *row["places"]]))
    shared = {row["run"] for row in rows if sum(other["run"] == row["run"] for other in rows) > 1}
    for row, group in zip(rows, groups.values(), strict=True):
        if row["run"] in shared:  # one recipe with other keys: the run directories tell them apart
            row["run"] += f" ({group[0]['folder']})"
    return Comparison(sorted(rows, key=lambda row: row["run"]), _papers(reports), unfinished, batch)


def _report(folder: Path) -> dict[str, Any]:
    """A finished run's report; PruneError where it cannot be read, or lacks what a row of the table says."""
    try:
        body = {**safe_parsing.read_json(folder / "report.json"), "folder": folder.name}
        shown_as = [_row([body], str(int(batch))) for batch in body["dense"]["latency"]]
        _ = canonical(body["recipe"]), [_cell(key, row[key]) for row in shown_as for key in columns()]
        if not shown_as:
            raise PruneError("it has no latency")
    except Exception as error:  # whatever values of other types make a row stumble over
        said = str(error) if isinstance(error, PruneError) else f"{type(error).__name__}: {shown(error)}"
        raise PruneError(f"report.json is unreadable ({said}); run the recipe again to write it anew") from error
    return body


def _runs(place: Path) -> list[Path]:
    if (place / "recipe.yaml").is_file() or (place / "errors").is_dir():
        return [place]
    if not place.is_dir():
        raise PruneError(f"there is no folder {place}")
    marks = {file.parent for file in place.glob("*/recipe.yaml")} | {file.parent for file in place.glob("*/errors")}
    return sorted(marks)


def _superseded(folder: Path) -> str:
    """Why the report that is there is not the run's: a later start failed, or is under way; else ''."""
    if not (folder / "report.json").is_file():
        return ""
    why = _why(folder)
    # every start clears the errors, and the report is the last stage
    late = any(folder.glob("errors/rank_*.json")) or (why.startswith("not finished") and not why.endswith(" report"))
    return f"{why} (its report is of an earlier start)" if late else ""


def _why(folder: Path) -> str:
    """Why a run has no report: what its ranks said last, or how far it came."""
    notes = []
    for file in sorted(folder.glob("errors/rank_*.json")):
        try:
            note = safe_parsing.read_json(file)
            notes.append(f"rank {note['rank']}: {note['error']}")
        except (PruneError, KeyError, TypeError):
            notes.append(f"{file} is damaged")
    if notes:
        return "; ".join(dict.fromkeys(notes))
    try:
        last = json.loads((folder / "ledger.jsonl").read_text().splitlines()[-1])["stage"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return "no stage finished"
    return f"not finished; the last finished stage is {last}"


def _row(group: Sequence[Mapping[str, Any]], batch: str) -> dict[str, Any]:
    """Mean over seeds of every figure; std (of the sample) of top-1."""

    def mean(value: Any) -> float:
        return statistics.fmean(value(report) for report in group)

    first = group[0]
    top1 = [report["finetuned"]["top1"] for report in group]
    ms = {kind: mean(lambda r, kind=kind: r[kind]["latency"][batch]["ms"]) for kind in ("dense", "finetuned")}
    timed = all(is_reliable(report[kind]["latency"][batch]) for report in group for kind in ms)
    sizes: dict[str, float | None] = {}
    for cost in report_costs():
        known = all(cost.name in report["dense"] for report in group)  # a report may be older than a cost
        left = mean(lambda r, key=cost.name: r["finetuned"][key]) if known else None
        share = None if left is None else left / mean(lambda r, key=cost.name: r["dense"][key])
        sizes |= {cost.name: None if left is None else left / cost.divisor, f"{cost.name}_share": share}
    dense = mean(lambda r: r["dense"]["top1"])
    return {
        "run": re.sub(r"-seed_\d+", "", first["name"]), "seeds": len(group),
        "backbone": first["recipe"]["backbone"]["name"], "method": first["recipe"]["method"]["name"],
        "dense_top1": dense, "pruned_top1": mean(lambda r: r["pruned"]["top1"]), "top1": statistics.fmean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None, "change": statistics.fmean(top1) - dense,
        **sizes, "ms": ms["finetuned"],
        "dense_ms": ms["dense"], "speedup": ms["dense"] / ms["finetuned"] if timed else None,
        "reliable": timed, "timed": "" if timed else DOUBTFUL, "places": sorted({_place(r, batch) for r in group}),
        "marked": "; ".join(selected_on_test(first["recipe"])),
    }  # fmt: skip


def _place(report: Mapping[str, Any], batch: str) -> str:
    """Where a run's times were taken: they cannot be compared with those of another device or thread count."""
    of, environment = report["finetuned"]["latency"][batch], report.get("environment") or {}
    cpu = str(of.get("device", "cpu")).startswith("cpu")
    device = environment.get("processor" if cpu else "gpu") or of.get("device", "cpu")
    return f"{device}, {of.get('threads')} thread(s)" if cpu else str(device)


def _papers(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the tables in the headers of the recipes that the runs come from."""
    names = {report["name"] for report in reports}
    out = []
    for stem in sorted({name.split("-")[0] for name in names}):
        try:
            file = loading.find(stem)
        except PruneError:
            continue  # the recipe is not here any more, or was never in recipes/
        out += [{"recipe": stem, **point} for point in paper_points(file.read_text())]
    return out


def paper_points(header: str) -> list[dict[str, Any]]:
    """The table ``WHAT  top-1 drop  FLOPs  parameters`` of a recipe's header.

    Returns:
        per row ``point`` ("WHAT VALUE", for example "threshold 0.7"), ``change`` of top-1 in points, ``macs_share`` and
        ``params_share`` that are kept (None where the paper does not say).
    """
    points, what = [], ""
    for line in header.splitlines():
        head, row = PAPER_HEAD.match(line), PAPER_ROW.match(line) if what else None
        what = head[1] if head else what if row else ""
        if row:
            macs, params = (None if change is None else 1 + float(change) / 100 for change in row.groups()[2:])
            points.append(
                {"point": f"{what} {row[1]}", "change": -float(row[2]), "macs_share": macs, "params_share": params}
            )
    return points


def _cell(key: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if key.endswith("_share"):
        return f"{value:.1%}"
    digits = {"speedup": "{:.2f}x", "change": "{:+.2f}", "ms": "{:.3f}"}
    return digits.get(key, "{:.2f}").format(value) if isinstance(value, float) else str(value)


def tables(found: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables (title, heads, rows of text): runs, the papers' points, unfinished runs; empty ones are left out."""
    heads = {**columns(), "ms": f"ms, batch {found.batch}"}
    for key in ("timed", "marked", *(f"{cost.name}{end}" for cost in report_costs() for end in ("", "_share"))):
        if not any(row[key] for row in found.rows):
            heads.pop(key)
    keys = ("recipe", "point", "change", "macs_share", "params_share")
    tables = (
        ("Runs", list(heads.values()), [[_cell(key, row[key]) for key in heads] for row in found.rows]),
        (
            "Papers", ["recipe", "point", "change, points", "MACs kept", "params kept"],
            [[_cell(key, point[key]) for key in keys] for point in found.papers],
        ),
        ("Not finished", ["run", "why"], [[item["run"], item["why"]] for item in found.unfinished]),
    )  # fmt: skip
    return [table for table in tables if table[2]]


def markdown(found: Comparison) -> str:
    """The tables as Markdown."""
    parts = []
    for title, heads, rows in tables(found):
        lines = [" | ".join(heads), "|".join(["---"] * len(heads)), *(" | ".join(row) for row in _plain(rows))]
        parts.append(f"**{title}**\n\n" + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _plain(rows: list[list[str]]) -> list[list[str]]:
    """Text that cannot break a Markdown table, nor bring HTML into a page that is made of it."""
    return [[escape.escape(" ".join(cell.split())).replace("|", "/") for cell in row] for row in rows]


def as_csv(found: Comparison) -> str:
    """A line per row, full precision, papers' points last."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*columns(), "source"], restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "source": "measured"} for row in found.rows)
    for point in found.papers:
        keys = {key: point[key] for key in ("change", "macs_share", "params_share")}
        writer.writerow({"run": f"{point['recipe']}, {point['point']}", "source": "paper", **keys})
    return stream.getvalue()
