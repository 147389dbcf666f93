"""Figures of the study: of a folder of pieces, of a compact file, as Markdown tables."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.which_parts.settings import SETTINGS, TARGETS, base_of

Piece = dict[str, Any]
TITLES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "mobilenetv2": "MobileNetV2, ImageNet",
    "mobilenetv2_half": "MobileNetV2, ImageNet",
}
MISSING = "not measured"
REPAIRED = {"untrained": "repaired", "global": "repaired_global"}  # the part of the same plan, repaired


def read(folder: Path) -> list[Piece]:
    """The pieces of a folder."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.seed*.json"))]


def merge(old: Iterable[Piece], new: Iterable[Piece]) -> list[Piece]:
    """All pieces; of two of the same network, method, part, seed and epochs the new one."""
    keys = ("network", "method", "part", "seed", "epochs")
    found = {tuple(map(str, map(piece.get, keys))): piece for piece in (*old, *new)}
    return [found[key] for key in sorted(found)]


def compact(pieces: Sequence[Piece]) -> str:
    """All figures of pieces as JSON: machines once, figures in lists, one line a piece."""
    abouts: list[Any] = []
    rows = []
    for piece in pieces:
        if piece["about"] not in abouts:
            abouts.append(piece["about"])
        key = [piece[name] for name in ("network", "method", "part", "seed")]
        key += [abouts.index(piece["about"]), round(piece["piece"]["cpu_seconds"])]
        if piece["part"] == "dense":
            figures: list[Any] = _pair(piece)
        elif piece["part"].startswith("finetune"):
            took = piece["took"]
            figures = [piece["epochs"], piece["images"], round(took["seconds"]), round(took["cpu_seconds"])]
            figures += _pair(piece["finetuned"])
        elif piece["part"].startswith("repaired"):
            took, left = piece["took"], [round(piece["left"][name], 4) for name in ("macs", "params")]
            figures = [piece["images"], round(took["seconds"]), round(took["cpu_seconds"]), left]
            figures += _pair(piece["repaired"])
        else:
            cost = piece["cost"]
            shown = [round(cost[name], 1) for name in ("images", "forward", "backward", "cpu_seconds")]
            left = [round(piece["left"][name], 4) for name in ("macs", "params")]
            five = piece.get("five")
            shown.append(None if five is None else round(five, 3))
            figures = [shown, left, _pair(piece["surgery"]), _pair(piece["recalibrated"])]
        rows.append(json.dumps([*key, *figures], separators=(",", ":")))
    lines = ",\n".join(rows)
    return f'{{"about": {json.dumps(abouts)},\n"pieces": [\n{lines}\n]}}\n'


def _pair(judged: dict[str, float]) -> list[float | None]:
    return [None if (value := judged.get(name)) is None else round(value, 2) for name in ("held_out", "test")]


def load(file: Path) -> list[Piece]:
    """The pieces of a compact file."""
    body = json.loads(file.read_text())
    return [_piece(row, body["about"]) for row in body["pieces"]]


def _judged(pair: Sequence[float | None]) -> dict[str, float]:
    return {name: value for name, value in zip(("held_out", "test"), pair, strict=True) if value is not None}


def _piece(row: list[Any], abouts: list[Any]) -> Piece:
    network, method, part, seed, about, cpu, *figures = row
    piece = {"network": network, "method": method, "part": part, "seed": seed, "about": abouts[about]}
    piece["piece"] = {"cpu_seconds": cpu}
    if part == "dense":
        return piece | _judged(figures)
    if part.startswith("finetune"):
        epochs, images, seconds, cpu, *pair = figures
        took = {"seconds": seconds, "cpu_seconds": cpu}
        return piece | {"epochs": epochs, "images": images, "took": took, "finetuned": _judged(pair)}
    if part.startswith("repaired"):
        images, seconds, cpu, left, *pair = figures
        piece |= {"images": images, "took": {"seconds": seconds, "cpu_seconds": cpu}}
        return piece | {"left": dict(zip(("macs", "params"), left, strict=True)), "repaired": _judged(pair)}
    cost, left, *pairs = figures
    *cost, five = cost
    named = dict(zip(("images", "forward", "backward", "cpu_seconds"), cost, strict=True))
    surgery, recalibrated = map(_judged, pairs)
    shares = dict(zip(("macs", "params"), left, strict=True))
    return piece | {"five": five, "cost": named, "left": shares, "surgery": surgery, "recalibrated": recalibrated}


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds if there are several."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def markdown(pieces: Sequence[Piece]) -> str:
    """A table of untrained networks for each network and target, and one of finetuned networks where there are some."""
    dense = [f"{TITLES[p['network']]} {p['test']:.1f} %" for p in pieces if p["part"] == "dense"]
    parts = [f"Top-1 of the dense networks: {'; '.join(dense) or MISSING}."]
    for network in TARGETS:
        own = [piece for piece in pieces if piece["network"] == network]
        if any(piece["part"] in ("untrained", "global") for piece in own):
            parts.append(_untrained(network, own))
        if any(piece["part"].startswith("finetune") for piece in own):
            parts.append(_finetuned(network, own))
    return "\n\n".join([*parts, _about(pieces)])


def _judges(pieces: Iterable[Piece], row: str, part: str, stage: str, images: str) -> list[float]:
    """Top-1 of each seed of a row."""
    return [
        piece[stage][images]
        for piece in pieces
        if piece["method"] == row and piece["part"] == part and images in piece[stage]
    ]


def _untrained(network: str, own: list[Piece]) -> str:
    decided = "test" if base_of(network) == "mobilenetv2" else "held_out"
    order = sorted(
        SETTINGS,
        key=lambda row: -statistics.mean(_judges(own, row, "untrained", "recalibrated", decided) or [-1]),
    )
    repaired = any(piece["part"].startswith("repaired") for piece in own)
    stages = f"surgery | recalibrated | held out |{' repaired |' * repaired} params"
    lines = [
        f"### {TITLES[network]}: {TARGETS[network]:g} of the MACs, not trained\n",
        f"| method | needs | images | forward | backward | s | {stages} | global: {stages} | seeds |",
        "|---" * (15 + 2 * repaired) + "|",
    ]
    for row in order:
        mine = [piece for piece in own if piece["method"] == row and piece["part"] in ("untrained", "global")]
        if not mine:
            continue
        told = [f"{mine[0]['cost'][name]:,.0f}" for name in ("images", "forward", "backward", "cpu_seconds")]
        cells = []
        for part in ("untrained", "global"):
            for stage, images in (("surgery", "test"), ("recalibrated", "test"), ("recalibrated", "held_out")):
                cells.append(spread(_judges(own, row, part, stage, images)))
            if repaired:
                cells.append(spread(_judges(own, row, REPAIRED[part], "repaired", "test")))
            left = [piece["left"]["params"] for piece in mine if piece["part"] == part]
            cells.append(f"{statistics.mean(left):.2f}" if left else "-")
        seeds = " / ".join(str(sum(p["part"] == part for p in mine)) for part in ("untrained", "global"))
        lines.append(f"| {' | '.join([row, SETTINGS[row].need, *told, *cells, seeds])} |")
    lines += _missing(order, {piece["method"] for piece in own if piece["part"] in ("untrained", "global")})
    shares = [
        f"{p['method']} {100 * p['five']:.0f} %"
        for p in own
        if p["part"] == "untrained" and p["seed"] == 0 and p.get("five") is not None
    ]
    if shares:
        lines.append(f"\nShare of the squared gradients that the five largest rows have, seed 0: {', '.join(shares)}.")
    return "\n".join(lines)


def _finetuned(network: str, own: list[Piece]) -> str:
    pieces = [piece for piece in own if piece["part"].startswith("finetune")]
    lengths = sorted({piece["epochs"] for piece in pieces})
    images = max(piece["images"] for piece in pieces)
    found = {(piece["method"], piece["part"]) for piece in pieces}
    rows = [(row, part) for row in SETTINGS for part in ("finetune", "finetune_global")]

    def of(key: tuple[str, str], epochs: int, name: str) -> list[float]:
        return [p["finetuned"][name] for p in pieces if (p["method"], p["part"]) == key and p["epochs"] == epochs]

    heads = [f"{e} epoch{'s' * (e > 1)}{word}" for e in lengths for word in (", held out", ", test", ", seeds")]
    order = sorted(rows, key=lambda key: [-statistics.mean(of(key, e, "held_out") or [-1]) for e in reversed(lengths)])
    lines = [
        f"### {TITLES[network]}: {TARGETS[network]:g} of the MACs, finetuned on {images:,} images\n",
        f"| method | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for key in order:
        if key not in found:
            continue
        cells = [key[0] + ("; global" if key[1] == "finetune_global" else "")]
        for epochs in lengths:
            cells += [spread(of(key, epochs, "held_out")), spread(of(key, epochs, "test"))]
            cells += [str(len(of(key, epochs, "test")))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += _missing(SETTINGS, {row for row, _ in found})
    minutes = ", ".join(
        f"{statistics.mean(p['took']['cpu_seconds'] for p in pieces if p['epochs'] == e) / 60:.1f} for {e}"
        for e in lengths
    )
    return "\n".join([*lines, f"\nProcessor minutes of a finetune, by epochs: {minutes}."])


def _missing(rows: Iterable[str], found: set[str]) -> list[str]:
    """A line that names the rows without any figure."""
    absent = [f"`{row}`" for row in rows if row not in found]
    return [f"\nNot measured: {', '.join(absent)}."] if absent else []


def _about(pieces: Sequence[Piece]) -> str:
    """Machines, threads and commits that the figures come from, and the processor time of all pieces."""
    hours = sum(piece["piece"]["cpu_seconds"] for piece in pieces) / 3600
    lines = {
        f"{a['processor']}, {a['cores']} cores, {a['threads']} thread(s), torch {a['torch']}, commit {a['commit']}"
        for a in (piece["about"] for piece in pieces)
    }
    return "\n".join([f"{len(pieces)} pieces, {hours:.1f} processor hours.", *sorted(f"- {line}" for line in lines)])
