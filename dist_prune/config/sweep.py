"""Sweep files, each of which expands to numbered tasks: a recipe and overrides, always in the same order.

    tasks:
      - base: resnet56_cifar10_graph               # a recipe, by path or by bare name
        grid: {select.threshold: [0.65, 0.7], seed: [0, 1]}      # every combination; the last key varies fastest
      - base: resnet56_cifar10_l1
        list: [{target.macs: 0.5}, {target.macs: 0.6, seed: 1}]  # one task each

With both, every entry of ``list`` meets every combination of ``grid``.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_prune.config import loading, recipe_files, safe_parsing
from dist_prune.config.recipe import Recipe
from dist_prune.errors import PruneError, nearest, shown
from dist_prune.fileio import canonical, digest

KEYS = ("base", "grid", "list")
LONGEST_NAME = 200  # characters of a run's folder
MOST_TASKS = 2000  # of one file; SLURM's MaxArraySize is 1,001 by default


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    Attributes:
        number: position in the file, from 0; equal to SLURM_ARRAY_TASK_ID.
        name: recipe and overrides as one word, independent of the file's other tasks.
        base: path or bare name of the recipe.
        overrides: ``key=value`` texts.
    """

    number: int
    name: str
    base: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """All tasks of a file; their run directories are side by side in ``runs/<name>``."""

    file: Path
    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    def task(self, number: int) -> Task:
        """A task by its number; PruneError if there is none."""
        if not 0 <= number < len(self.tasks):
            raise PruneError(
                f"--task: {self.file} has the tasks 0 to {len(self.tasks) - 1}, there is no {number} "
                f"(an array over all of them is --array=0-{len(self.tasks) - 1})"
            )
        return self.tasks[number]


def find_sweep(name_or_path: str) -> Path:
    """The sweep file of a path or of a bare name in ``recipes/sweeps``."""
    return recipe_files.find(name_or_path, recipe_files.SWEEPS)


def load_sweep(name_or_path: str, options_of: loading.OptionsOf | None = None, need_environment: bool = True) -> Sweep:
    """Expand a sweep file, and read and validate every task's recipe.

    Args:
        name_or_path: a YAML file, or a bare name in ``recipes/sweeps``.
        options_of: method name -> the model of its options, to validate them too; None: they are not validated.
        need_environment: whether an unset ``${VARIABLE}`` of a recipe is an error.

    Raises:
        PruneError: with a line for each error in the file or in any task.
    """
    file = find_sweep(name_or_path)
    if not file.stem.strip("."):
        raise PruneError(f"{file}: the file's name is that of the runs' folder, so it cannot be dots alone")
    body = safe_parsing.read_yaml(file)
    if not isinstance(body, dict) or set(body) != {"tasks"} or not isinstance(body["tasks"], list) or not body["tasks"]:
        raise PruneError(f"{file}: a sweep is 'tasks:', a list of entries with {', '.join(KEYS)}; nothing else")
    problems: list[str] = []
    pairs = [pair for index, entry in enumerate(body["tasks"]) for pair in _expand(entry, f"tasks[{index}]", problems)]
    if len(pairs) > MOST_TASKS:
        problems.append(f"more than {MOST_TASKS:,} tasks; split the sweep over several files")
        pairs = []
    tasks, seen = [], {}
    for number, (base, values) in enumerate(pairs):
        overrides = tuple(f"{key}={canonical(value)}" for key, value in values.items())
        task = Task(number, _name(base, values), base, overrides)
        tasks.append(task)
        if task.name in seen:
            problems.append(f"tasks {seen[task.name]} and {number} are the same run, {task.name}")
        seen.setdefault(task.name, number)
        try:
            loading.load(base, list(overrides), options_of, need_environment)
        except PruneError as error:
            problems.append(f"task {number} ({task.name}): {error}")
    if problems:
        raise PruneError(
            f"{file}: {len(problems)} error{'s' * (len(problems) > 1)}\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return Sweep(file, tuple(tasks))


def choose_run(
    recipe: str | None,
    sweep: str | None,
    task: int | None,
    overrides: list[str],
    options_of: loading.OptionsOf | None = None,
    need_environment: bool = True,
) -> tuple[Recipe, Path]:
    """Load the recipe to run, or that of one task of a sweep, and name its run directory.

    Run directories are in ``runs``, or in the folder that DIST_PRUNE_RUNS names.

    Args:
        recipe: a YAML file or a bare name; not used if there is a sweep.
        sweep: a sweep file or a bare name; None: run ``recipe``.
        task: number of the sweep's task; None: SLURM_ARRAY_TASK_ID.
        overrides: ``key=value`` texts, applied after the task's own.
        options_of: method name -> the model of its options, to validate them too; None: they are not validated.
        need_environment: whether an unset ``${VARIABLE}`` of the recipe is an error.

    Raises:
        PruneError: if there is no such recipe or task, or with a line for each error in it.
    """
    runs = Path(os.environ.get("DIST_PRUNE_RUNS") or "runs")
    if not sweep:
        loaded = loading.load(str(recipe), overrides, options_of, need_environment)
        return loaded, runs / loaded.name
    array_task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if task is None and not array_task.isdigit():
        raise PruneError("--sweep: name the task, --task N ('dist-prune sweep FILE' lists them)")
    tasks = load_sweep(sweep, options_of, need_environment)
    chosen = tasks.task(int(array_task) if task is None else task)
    words = [*chosen.overrides, f"name={chosen.name}", *overrides]
    loaded = loading.load(chosen.base, words, options_of, need_environment)
    return loaded, runs / tasks.name / chosen.name


def _expand(entry: Any, where: str, problems: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (recipe, {key: value}) of every task of one entry; errors join ``problems``."""
    if not isinstance(entry, dict) or not isinstance(entry.get("base"), str):
        problems.append(f"{where}: write base: RECIPE, with a grid or a list of keys")
        return
    for key in sorted(set(entry) - set(KEYS), key=str):
        problems.append(
            f"{where}.{str(key)[:60]}: unknown key.{nearest(str(key), KEYS)} Allowed here: {', '.join(KEYS)}."
        )
    grid = entry.get("grid") or {}
    rows = entry.get("list", [{}])
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        problems.append(f"{where}.grid: write {{key: [value, ...]}}, for example {{target.macs: [0.5, 0.6]}}")
        return
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        problems.append(f"{where}.list: write [{{key: value}}, ...], for example [{{target.macs: 0.5}}]")
        return
    odd = [key for mapping in (grid, *rows) for key in mapping if not isinstance(key, str) or "=" in key or not key]
    if odd:
        problems.append(f"{where}: {shown(odd[0])} is no key of a recipe; write names, for example target.macs")
        return
    number = math.prod([len(rows), *map(len, grid.values())])
    if number > MOST_TASKS:
        problems.append(f"{where}: {shown(number)} tasks; at most {MOST_TASKS:,} in a file. Split the sweep")
        return
    for row in rows:
        duplicates = sorted(set(row) & set(grid))
        if duplicates:
            verb = "is" if len(duplicates) == 1 else "are"
            problems.append(f"{where}: {', '.join(duplicates)} {verb} in grid and in list")
            return
        for values in itertools.product(*grid.values()):
            yield entry["base"], {**row, **dict(zip(grid, values, strict=True))}


def _name(base: str, values: Mapping[str, Any]) -> str:
    """The name of a task's folder, for example ``resnet56_cifar10_graph-threshold_0.7-seed_1``."""
    settings = [f"{key.rpartition('.')[2]}_{value}" for key, value in values.items()]
    name = re.sub(r"[^\w.-]+", "_", "-".join([Path(base).stem, *settings]))
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 17]}-{digest(name)[:16]}"
