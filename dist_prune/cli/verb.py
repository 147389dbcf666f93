"""The parts that the verbs of ``dist-prune`` share: their protocol, arguments of several verbs, checks of values."""

import argparse
from pathlib import Path
from typing import Any, Protocol

from dist_prune.errors import PruneError

Answer = tuple[str, Any, int]


class Verb(Protocol):
    """A verb's module, for example ``cli/plan.py``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's command line on its own parser."""
        ...

    def run(self, arguments: argparse.Namespace) -> Answer:
        """Do the work.

        Returns:
            The text for a terminal, the same as JSON-ready values (None if the verb has printed its answer itself),
            and the exit code.
        """
        ...


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declare a recipe and its overrides as positional arguments."""
    parser.add_argument("recipe", help="a YAML file, or a name in recipes/")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Declare ``key=value`` arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, for example score.images=500")


def check_range(option: str, value: int, largest: int) -> None:
    """Raise a ``PruneError`` unless ``value`` lies between 1 and ``largest``."""
    if not 1 <= value <= largest:
        raise PruneError(f"{option}: {value} is out of range; name 1 to {largest:,}")


def bundle_folder(name: str) -> Path | None:
    """The folder of a bundle: a run directory's ``export`` or the folder itself; None if it is not on this machine."""
    folder = Path(name)
    folder = folder / "export" if (folder / "export").is_dir() else folder
    return folder if folder.is_dir() else None
