"""``dist-prune list``: the methods, recipes, backbones and recipe keys that there are."""

import argparse
from dataclasses import asdict

from dist_prune import methods
from dist_prune.cli.verb import Answer
from dist_prune.config import loading
from dist_prune.config.familiar_names import METHOD_ALIASES
from dist_prune.config.recommendation import LABELS, LABELS_AND_TIME, WEIGHTS_ALONE
from dist_prune.errors import PruneError
from dist_prune.methods.needs import Needs

NEEDS = ("images", "labels", "gradients", "training")
HELP = "list methods, recipes, backbones or recipe keys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("what", choices=("methods", "recipes", "backbones", "keys"), help="the things to list")
    parser.add_argument("pattern", nargs="?", default="", help="a glob of backbones, or the method whose keys to list")


def run(arguments: argparse.Namespace) -> Answer:
    """List what ``arguments.what`` names."""
    lists = {"methods": _methods, "keys": _keys, "recipes": _recipes, "backbones": _backbones}
    return lists[arguments.what](arguments.pattern)


def _methods(pattern: str) -> Answer:
    rows, body = [], {}
    for name in methods.list_names():
        try:
            method = methods.find(name)
        except PruneError as error:
            body[name] = {"error": str(error)}
            rows.append([name, f"cannot be used: {error}"])
            continue
        needs = method.needs
        body[name] = {"paper": method.paper, "needs": None if needs is None else {**asdict(needs), "cost": needs.cost}}
        body[name]["aliases"] = [alias for alias, known in METHOD_ALIASES.items() if known == name]
        marks = [*(_mark(needs, key) for key in NEEDS), needs.cost if needs is not None else "not declared"]
        rows.append([name, *marks, method.paper])
    head = ["method", *NEEDS, "cost", "paper"]
    whole = [row for row in [head, *rows] if len(row) == len(head)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        if len(row) == len(head)
        else f"{row[0]:{widths[0]}}  {row[1]}"
        for row in [head, *rows]
    ]
    recommended = [f"  {one.method:{widths[0]}}  {one.situation}" for one in (WEIGHTS_ALONE, LABELS, LABELS_AND_TIME)]
    notes = [
        "",
        "cost: forward passes over the calibration images (score.images); a backward pass counts as two.",
        "No images: the weights alone are read. ?: the package that brings the method does not say.",
        "method.name=auto takes, if there are",
        *recommended,
    ]
    return "\n".join([*lines, *notes]), body, 0


def _mark(needs: Needs | None, key: str) -> str:
    return "?" if needs is None else "yes" if getattr(needs, key) else "-"


def _keys(method: str) -> Answer:
    text = loading.reference(methods.options_of(method), "method.") if method else loading.reference()
    return text, [line.split(" | ")[0].strip("| `") for line in text.splitlines()[2:]], 0


def _recipes(pattern: str) -> Answer:
    files = {name: str(file) for name, file in loading.known_recipes().items()}
    return "\n".join(f"{name:32}  {path}" for name, path in sorted(files.items())), files, 0


def _backbones(pattern: str) -> Answer:
    from dist_prune import models  # timm takes seconds to import

    names = models.list_names(pattern)
    return "\n".join(names), names, 0
