"""Figures of the benchmark: of a folder of cells, of a compact file, as a Markdown table."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
KEY = ("case", "macs", "criterion", "images", "repair")
FIGURES = ("dense", "top1", "judge", "macs_left", "params_left", "score_cpu_seconds", "seconds", "cpu_seconds")
REPAIRS = ("none", "norms", "bias", "fold", "least_squares")


def read(folder: Path) -> list[Cell]:
    """The cells of a folder."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*/cell.json"))]


def load(file: Path) -> list[Cell]:
    """The cells of a compact file."""
    body = json.loads(file.read_text())
    return [dict(zip((*KEY, *FIGURES), row, strict=False)) | {"about": body["about"][row[-1]]} for row in body["cells"]]


def merged(file: Path, new: Iterable[Cell]) -> list[Cell]:
    """The cells of a compact file, if it is there, and others; of two of the same cell the new one."""
    old = load(file) if file.exists() else []
    found = {tuple(cell[key] for key in KEY): cell for cell in (*old, *new)}
    return [found[key] for key in sorted(found)]


def compact(cells: Sequence[Cell]) -> str:
    """All figures as JSON: machines once, one line a cell."""
    abouts: list[Any] = []
    rows = []
    for cell in cells:
        if cell["about"] not in abouts:
            abouts.append(cell["about"])
        figures = [round(cell[name], 4 if name.endswith("left") else 2) for name in FIGURES]
        rows.append(json.dumps([*(cell[key] for key in KEY), *figures, abouts.index(cell["about"])]))
    lines = ",\n".join(rows)
    columns = json.dumps([*KEY, *FIGURES, "about"])
    return f'{{"columns": {columns},\n"about": {json.dumps(abouts)},\n"cells": [\n{lines}\n]}}\n'


def markdown(cells: Iterable[Cell]) -> str:
    """A line for each case, criterion and number of images."""
    cells = list(cells)
    names = [name for name in REPAIRS if any(cell["repair"] == name for cell in cells)]
    lines = [
        f"| network | MACs | dense % | images | criterion | {' | '.join(names)} | CPU s of least squares |",
        "|---" * (6 + len(names)) + "|",
    ]
    rows: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for cell in cells:
        key = (cell["case"], cell["macs"], f"{cell['dense']:.2f}", cell["images"], cell["criterion"])
        rows.setdefault(key, {})[cell["repair"]] = cell
    for key, found in sorted(rows.items()):
        shown = [f"{found[name]['top1']:.2f}" if name in found else "-" for name in names]
        last = found.get("least_squares")
        lines.append(
            f"| {' | '.join(map(str, key))} | {' | '.join(shown)} | {last['cpu_seconds'] if last else 0:.0f} |"
        )
    return "\n".join(lines)
