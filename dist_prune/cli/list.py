"""``dist-prune list``: the methods, recipes, backbones and recipe keys that there are."""

import argparse

from dist_prune import methods
from dist_prune.cli.verb import Answer
from dist_prune.config import loading
from dist_prune.errors import PruneError

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
    papers = {}
    for name in methods.list_names():
        try:
            papers[name] = methods.find(name).paper
        except PruneError as error:
            papers[name] = f"cannot be used: {error}"
    width = max(map(len, papers))
    return "\n".join(f"{name:{width}}  {paper}" for name, paper in papers.items()), papers, 0


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
