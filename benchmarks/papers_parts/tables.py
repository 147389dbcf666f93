"""Figures of the papers' rows: read from reports, kept in one compact file, printed as Markdown."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers_parts.rows import CASES, Case
from dist_prune.report.papers_html import PaperRow, PaperTable, spread

Figures = dict[str, Any]
KEY = ("case", "row", "seed", "shortened")


def figures(case: str, row: str, seed: int, report: dict[str, Any], words: Sequence[str]) -> Figures:
    """What the table needs of a report.

    Args:
        case: name in ``CASES``.
        row: its row.
        seed: of the run.
        report: the body of report.json.
        words: overrides by which the run was shortened.
    """
    dense, pruned, tuned = (report[name] for name in ("dense", "pruned", "finetuned"))
    environment = report.get("environment", {})
    sparse = pruned.get("sparse") or {"weights": 0, "nonzero": 0}
    masked = sparse["weights"] - sparse["nonzero"]  # they are in the network, and in no count of the papers
    reruns = report.get("reruns", {}).get("top1")
    more = {"reruns": [round(value, 3) for value in reruns]} if reruns else {}
    return {
        **more,
        "case": case, "row": row, "seed": seed, "shortened": " ".join(words),
        "dense": round(dense["top1"], 3), "pruned": round(pruned["top1"], 3), "finetuned": round(tuned["top1"], 3),
        "macs": round(pruned["macs"] / dense["macs"], 5),
        "params": round((pruned["params"] - masked) / dense["params"], 5),
        "about": {
            **{key: environment.get(key) for key in ("processor", "cores", "threads", "python")},
            "commit": report.get("commit"),  # beside the environment, not in it
        },
    }  # fmt: skip


def merge(old: list[Figures], new: list[Figures]) -> list[Figures]:
    """The rows of both, the new ones in place of the same old ones."""
    by_key = {tuple(row[key] for key in KEY): row for row in [*old, *new]}
    return [by_key[key] for key in sorted(by_key)]


def compact(rows: list[Figures]) -> str:
    """The rows as a file: one a line."""
    return "[\n" + ",\n".join(json.dumps(row, sort_keys=True) for row in rows) + "\n]\n"


def load(file: Path) -> list[Figures]:
    """The rows of a compact file."""
    return json.loads(file.read_text())


def for_page(rows: list[Figures]) -> list[PaperTable]:
    """The rows as the page takes them; shortened ones are no figures of the papers' and are left out."""
    whole = [row for row in rows if not row["shortened"]]
    parts = []
    for name, case in CASES.items():
        own = [row for row in whole if row["case"] == name]
        found = []
        for row in case.rows:
            of_row = [one for one in own if one["row"] == row.name]
            shares = [statistics.mean(one[key] for one in of_row) if of_row else None for key in ("macs", "params")]
            cut = [one["pruned"] for one in of_row]
            found.append(PaperRow(row.name, row.paper, cut, _finetuned(of_row), *shares))
        dense = [value for _, value in sorted({(row["seed"], row["dense"]) for row in own})]
        parts.append(PaperTable(name, case.paper, case.recipe, case.note, dense, case.dense, found))
    return parts


def _finetuned(rows: list[Figures]) -> list[float]:
    """Top-1 of every finetuning: a row may have several, from the same cut."""
    return [value for row in rows for value in row.get("reruns") or [row["finetuned"]]]


def markdown(rows: list[Figures]) -> str:
    """A table for each case; rows without a figure say so."""
    parts = []
    for name, case in CASES.items():
        kinds = sorted({row["shortened"] for row in rows if row["case"] == name}) or [""]
        parts += [_table(name, case, [row for row in rows if row["shortened"] == kind], kind) for kind in kinds]
    return "\n\n".join(parts)


def _table(name: str, case: Case, rows: list[Figures], shortened: str) -> str:
    own = [row for row in rows if row["case"] == name]
    trained = sorted({(row["seed"], row["dense"]) for row in own})
    dense = spread([value for _, value in trained]) if trained else "not run"
    lines = [f"### {name}: {case.paper}, `{case.recipe}`", "", case.note]
    if shortened:
        lines.append(f"**Shortened by `{shortened}`: no figure of the paper's.**")
    lines += [f"Dense: {dense}{f'; paper or program: {case.dense}' if case.dense else ''}.", ""]
    lines += [
        "| row | paper | MACs | parameters | after the cut | finetuned | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in case.rows:
        found = [one for one in own if one["row"] == row.name]
        paper = row.paper or "not at hand"
        if not found:
            lines.append(f"| {row.name} | {paper} | | | | not run | 0 |")
            continue
        cells = [spread([one["pruned"] for one in found]), spread(_finetuned(found))]
        macs, params = (f"{statistics.mean(one[key] for one in found):.3f}" for key in ("macs", "params"))
        lines.append(f"| {row.name} | {paper} | {macs} | {params} | {cells[0]} | {cells[1]} | {len(found)} |")
    return "\n".join(lines)
