"""``dist-prune list``: the methods, recipes, backbones, data sets, targets, tasks and recipe keys that there are."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import takewhile

from dist_prune import plugins
from dist_prune.cli.method_sources import read_methods
from dist_prune.cli.verb import Answer
from dist_prune.config import recipe_files
from dist_prune.config.familiar_names import METHOD_ALIASES
from dist_prune.config.method_needs import Needs
from dist_prune.config.recommendation import IMAGES, LABELS, LABELS_AND_TIME
from dist_prune.errors import PruneError

NARROW = 40  # columns beside the longest name; with fewer a recipe's name has a line of its own
FACTS = {"paper": "paper", "data": "needs", "cost": "cost"}  # of a recipe: label -> word in the header of its file
NEEDS = ("images", "labels", "gradients", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("what", choices=tuple(LISTS), help="the things to list")
    parser.add_argument(
        "pattern", nargs="?", default="", help="a glob of backbones or recipes, or the method whose keys to list"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """List what ``arguments.what`` names."""
    text, body, code = LISTS[arguments.what](arguments.pattern)
    if broken := plugins.warning(plugins.unusable()):
        print(broken, file=sys.stderr)
    return text, body, code


def _methods(pattern: str) -> Answer:
    rows, body = [], {}
    own = read_methods()
    for name in sorted({*own, *plugins.names("method")}):
        try:
            paper, needs = _declared(name) if name in plugins.names("method") else (own[name].paper, own[name].needs)
        except PruneError as error:
            for plugin in plugins.installed("method"):
                if plugin.name == name:
                    plugins.note_unusable(plugin, str(error))
            body[name] = {"error": str(error)}
            rows.append([name, f"cannot be used: {error}"])
            continue
        body[name] = {
            "paper": f"{paper}{_origin('method', name)}",
            "needs": None if needs is None else {**asdict(needs), "cost": needs.cost},
        }
        body[name]["aliases"] = [alias for alias, known in METHOD_ALIASES.items() if known == name]
        marks = [*(_mark(needs, key) for key in NEEDS), needs.cost if needs is not None else "not declared"]
        rows.append([name, *marks, body[name]["paper"]])
    head = ["method", *NEEDS, "cost", "paper"]
    whole = [row for row in [head, *rows] if len(row) == len(head)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        if len(row) == len(head)
        else f"{row[0]:{widths[0]}}  {row[1]}"
        for row in [head, *rows]
    ]
    recommended = [f"  {one.method:{widths[0]}}  {one.situation}" for one in (IMAGES, LABELS, LABELS_AND_TIME)]
    notes = [
        "",
        "cost: forward passes over the calibration images (score.images); a backward pass counts as two.",
        "No images: the weights alone are read. ?: the package that brings the method does not say.",
        "method.name=auto takes, if there are",
        *recommended,
    ]
    return "\n".join([*lines, *notes]), body, 0


def _declared(name: str) -> tuple[str, Needs | None]:
    """Paper and needs of a method of another package, which is imported."""
    from dist_prune import methods

    method = methods.find(name)
    return method.paper, method.needs


def _mark(needs: Needs | None, key: str) -> str:
    return "?" if needs is None else "yes" if getattr(needs, key) else "-"


def _origin(kind: plugins.Kind, name: str) -> str:
    """The package whose entry point has a name, as the end of a line; empty for dist_prune's own."""
    return next((f"  [{plugin.package}]" for plugin in plugins.installed(kind) if plugin.name == name), "")


def _keys(method: str) -> Answer:
    from dist_prune.config import loading  # pydantic takes longer than the lists that need no recipe

    if method:
        from dist_prune import methods

        text = loading.reference(methods.options_of(method), "method.")
    else:
        text = loading.reference()
    return text, [line.split(" | ")[0].strip("| `") for line in text.splitlines()[2:]], 0


def _recipes(pattern: str) -> Answer:
    files = recipe_files.known_recipes()
    chosen = {name: files[name] for name in sorted(files) if fnmatch(name, pattern or "*")}
    headers = {name: recipe_files.header(file) for name, file in chosen.items()}
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    width = max(map(len, chosen), default=0)
    lines = []
    for name in chosen:
        title = _first_sentence(headers[name].get("title", ""))
        if columns is None or columns >= width + NARROW:
            lines += _wrapped(f"{name:{width}}  ", title, columns)
        else:  # the name has a line of its own
            lines += [name, *_wrapped(f"{'':4}", title, columns)]
        for label, key in FACTS.items():
            if text := headers[name].get(key, ""):
                fact = _first_sentence(_source(text) if label == "paper" else text)
                lines += _wrapped(f"{'':4}{label:7}", fact, columns)
    notes = ["", "some: dist-prune list recipes 'resnet50*'; all of one: dist-prune list recipes NAME"]
    if len(chosen) == 1:
        (name,) = chosen
        written = takewhile(lambda line: line.startswith("#"), chosen[name].read_text(encoding="utf-8").splitlines())
        lines, notes = [str(chosen[name]), *(f"  {line[2:]}" for line in written)], []
    body = {name: {"file": str(file), **headers[name]} for name, file in chosen.items()}
    return "\n".join([*lines, *notes]), body, 0


def _wrapped(label: str, text: str, columns: int | None) -> list[str]:
    """A label and its text, wrapped to the right of the label; on one line if the output is no terminal (None)."""
    if columns is None:
        return [f"{label}{text}".rstrip()]
    room = max(20, columns - len(label))
    parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{label if number == 0 else ' ' * len(label)}{part}".rstrip() for number, part in enumerate(parts)]


def _source(text: str) -> str:
    """A paper without its figures: what stands before a semicolon, or before their table, which has wide blanks."""
    return re.sub(r" \S+ {2,}.*", "", text).split("; ")[0]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z0-9)])\. ", text)[0].rstrip(".")


def _backbones(pattern: str) -> Answer:
    from dist_prune import models  # timm takes seconds to import

    names = models.list_names(pattern)
    of_others = models.plugin_networks.origins()
    lines = [f"{name}  [{of_others[name].package}]" if name in of_others else name for name in names]
    return "\n".join(lines), names, 0


def _datasets(pattern: str) -> Answer:
    from dist_prune.config.data import SOURCES, source_names

    captions = dict(SOURCES)
    for plugin in plugins.installed("dataset"):
        if plugin.name in captions:
            plugins.note_unusable(plugin, f"{plugin} has the name of a data set of dist_prune itself; rename it")
        else:
            captions[plugin.name] = f"{plugin.value}{_origin('dataset', plugin.name)}"
    width = max(map(len, source_names()))
    more = (
        "package.module:Dataset or ./file.py:Dataset: any map-style Dataset of (image, label), docs/adding-a-dataset.md"
    )
    return "\n".join([*(f"{name:{width}}  {text}" for name, text in captions.items()), more]), captions, 0


def _targets(pattern: str) -> Answer:
    from dist_prune.config.pruning import Target
    from dist_prune.pruning.selection.cost import COSTS

    captions = {}
    for cost in COSTS.values():
        if cost.target:
            field = Target.model_fields.get(cost.name)
            text = field.description if field is not None else Target.costs.get(cost.name)
            captions[cost.name] = f"{text}{_origin('cost', cost.name)}"
    width = max(map(len, captions))
    return "\n".join(f"{name:{width}}  {text}" for name, text in captions.items()), captions, 0


def _tasks(pattern: str) -> Answer:
    from dist_prune import tasks  # torch takes seconds to import
    from dist_prune.data.random_access import TARGETS

    rows, body = [], {}
    for name in tasks.list_names():
        try:
            kind = tasks.find(name)
        except PruneError as error:  # another package's, which cannot be imported
            rows.append((name, f"cannot be used: {error}"))
            body[name] = {"error": str(error)}
            continue
        keys = [f"task.{key}" for key in kind.Options.model_fields]
        learns = TARGETS.get(kind.targets, "any data: nothing is learned from its targets").partition(" (")[0]
        words = [learns, f"judged by {kind.titles[kind.primary]}", *([", ".join(keys)] if keys else [])]
        rows.append((name, f"{'; '.join(words)}{_origin('task', name)}"))
        body[name] = {"targets": learns, "primary": kind.primary, "keys": keys}
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows), body, 0


LISTS: dict[str, Callable[[str], Answer]] = {
    "methods": _methods,
    "recipes": _recipes,
    "backbones": _backbones,
    "datasets": _datasets,
    "targets": _targets,
    "tasks": _tasks,
    "keys": _keys,
}
