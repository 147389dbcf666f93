"""What every form of ``dist-prune launch`` needs of a command line: the recipe, its processes, cores and memory."""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dist_prune.config import loading, sweep
from dist_prune.config.recipe import Recipe
from dist_prune.errors import PruneError, shown, unknown

PACKAGE = Path(__file__).resolve().parents[1]
PORT = 29500  # torch's own
RESTARTS = 20
GRACE_S = 180  # seconds between the request to stop and the end, as in slurm/run.sbatch
START_NODE = "dist_prune.distributed.start_node"
SINGLE_WORDS = ("time", "account", "qos", "partition", "container", "runs", "gpu_type", "master")
LONGEST_NAME = 40  # characters: Kubernetes adds the names of jobs and pods, and allows 63


@dataclass(frozen=True)
class Job:
    """One run on several nodes.

    Attributes:
        recipe: the recipe with its overrides.
        word: the recipe as ``--recipe`` takes it: a name, or an absolute path.
        overrides: ``key=value`` texts.
        nodes: number of nodes.
        gpus: GPUs of each node.
        processes: processes on each node.
        cpus: cores of each node.
        memory_gib: memory of each node in GiB, or None.
    """

    recipe: Recipe
    word: str
    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    processes: int
    cpus: int
    memory_gib: float | None

    @property
    def name(self) -> str:
        """The recipe's name as schedulers take it: small letters, digits and hyphens."""
        text = re.sub(r"[^a-z0-9]+", "-", self.recipe.name.lower()).strip("-")
        return (text if text[:1].isalpha() else f"run-{text}")[:LONGEST_NAME].strip("-")

    @property
    def file(self) -> Path | None:
        """The recipe's file if it is none of the package's: other machines do not have it."""
        return Path(self.word) if Path(self.word).is_absolute() else None

    def command(self, runs: str, recipe: str | None = None) -> list[str]:
        """The words that start one node's processes; node rank and address come from the scheduler's variables.

        Args:
            runs: folder of the run directories there.
            recipe: the recipe's name or path there; None: as here.
        """
        return [
            "python", "-m", START_NODE, "--nodes", str(self.nodes), "--processes", str(self.processes),
            "--", "--recipe", recipe or self.word, "--run-dir", f"{runs}/{self.recipe.name}", *self.overrides,
        ]  # fmt: skip


def read_job(arguments: argparse.Namespace) -> Job:
    """The run of a command line that names a recipe.

    Raises:
        PruneError: if it names none, or the recipe is wrong.
    """
    from dist_prune import methods

    words = list(arguments.words)
    name = recipe_word(words)
    if name is None:
        raise PruneError("launch: name a recipe ('dist-prune list recipes' shows what there is)")
    words.remove(name)
    recipe = sweep.choose_run(name, None, None, words, methods.options_of, need_environment=False)[0]
    return Job(
        recipe, absolute(name), tuple(words), arguments.nodes, arguments.gpus, processes(arguments),
        cores(arguments, [recipe]), memory_gib(arguments.mem),
    )  # fmt: skip


def recipe_word(words: Iterable[str]) -> str | None:
    """The first word that is no ``key=value``."""
    return next((word for word in words if "=" not in word), None)


def absolute(recipe: str) -> str:
    """The absolute path of a recipe's file; a bare name stays."""
    path = Path(recipe)
    return str(path.resolve()) if path.is_file() else recipe


def processes(arguments: argparse.Namespace) -> int:
    """The number of processes on each node."""
    return arguments.processes or arguments.gpus or 1


def cores(arguments: argparse.Namespace, recipes: Iterable[Recipe]) -> int:
    """The cores of each node: ``--cpus``, or one for each process and one for each of its loader workers.

    Args:
        arguments: the verb's parsed command line.
        recipes: those that are run, one at a time; the largest ``data.workers`` counts.
    """
    return arguments.cpus or processes(arguments) * (1 + max(recipe.data.workers for recipe in recipes))


def recipes_of(tasks: sweep.Sweep, words: list[str]) -> list[Recipe]:
    """The recipes of a sweep's tasks with further overrides."""
    return [
        loading.load(task.base, [*task.overrides, *words], need_environment=False)
        for task in tasks.tasks
    ]  # fmt: skip


def memory_gib(text: str | None) -> float | None:
    """A size such as 64G in GiB; a number without a unit is in MiB, as SLURM reads it.

    Raises:
        PruneError: the text is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,9})([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise PruneError(f"--mem: {shown(text)} is no size; write for example 64G (units: K, M, G, T)")
    return int(match[1]) * 1024.0 ** ("KMGT".index(match[2].upper() or "M") - 2)


def check_single_words(arguments: argparse.Namespace) -> None:
    """Raise a ``PruneError`` for a value with spaces or line ends: it would become further lines of a script."""
    for name in SINGLE_WORDS:
        check_word(f"--{name.replace('_', '-')}", getattr(arguments, name))
    for value in arguments.mount:
        check_word("--mount", value)


def check_word(option: str, value: str | None) -> None:
    """Raise a ``PruneError`` unless a value is None or one printable word without spaces, quotes and commas."""
    if value is not None and (not value or not value.isprintable() or re.search(r"[\s'\"\\,;]", value)):
        raise PruneError(f"{option}: {shown(value)} is no single word; leave out spaces, quotes, commas and semicolons")


def configs() -> dict[str, Path]:
    """Name -> file of each launch config of the package, sorted."""
    return {file.stem: file for file in sorted(package_folder("launch").glob("*.yaml"))}


def find_config(name: str, argument: str) -> Path:
    """The launch config of a name.

    Args:
        name: with or without ``.yaml``.
        argument: the command-line argument, for the error.

    Raises:
        PruneError: there is none; the text has the nearest name and all of them.
    """
    found = configs()
    stem = name.removesuffix(".yaml")
    if stem not in found:
        raise PruneError(f"{argument}: {unknown('launch config', name, found)}")
    return found[stem]


def package_folder(name: str) -> Path:
    """A folder of files beside the code: of the checkout, or of the installed package."""
    checkout = PACKAGE.parent / name
    return checkout if (PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir() else PACKAGE / name
