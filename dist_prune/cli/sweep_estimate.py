"""How long the tasks of a sweep take and how much disk they need: as finished ones did, or by a few measured steps."""

import heapq
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_prune.config.recipe import Recipe
from dist_prune.errors import PruneError
from dist_prune.fileio import canonical, read_text, unseal
from dist_prune.training.progress import duration

if TYPE_CHECKING:  # a sweep with a finished task of each recipe needs no torch
    from dist_prune.cli.speed_probe import Speed

KINDS = 6  # most networks and data that are measured; others are taken for the mean


@dataclass(frozen=True)
class Cost:
    """What a task takes.

    Attributes:
        seconds: of all but the training of its dense network, or of all if it was measured on finished tasks.
        size: bytes in its run directory.
        dense_s: seconds of the training of its dense network, which tasks of equal ``dense`` share.
        dense: what decides the dense network.
    """

    seconds: float
    size: float
    dense_s: float = 0.0
    dense: str = ""


def estimate(body: Sequence[Mapping[str, Any]], recipes: Mapping[int, Recipe], jobs: int) -> str:
    """How long the other tasks take and how much disk they need.

    Args:
        body: ``task``, ``base``, ``run`` and ``state`` of each task; at least one is not finished.
        recipes: number of each task -> its recipe.
        jobs: tasks at a time.
    """
    done: dict[str, list[Cost]] = {}
    for entry in body:
        if entry["state"] == "finished":
            done.setdefault(entry["base"], []).append(_finished(Path(entry["run"])))
    left = [entry for entry in body if entry["state"] != "finished"]
    unlike = sorted({entry["base"] for entry in left} - done.keys())
    probed, problem, notes = _probe({e["task"]: recipes[e["task"]] for e in left if e["base"] in unlike}, jobs)
    finished = [cost for costs in done.values() for cost in costs]
    known = finished or list(probed.values())
    if not known:
        return (
            f"time and disk: not known before one task is finished here (run.py --sweep FILE --task N runs one): "
            f"{problem.splitlines()[0]}"
        )
    mean = _mean(known)
    means = {base: _mean(costs) for base, costs in done.items()}
    each = [probed.get(entry["task"]) or means.get(entry["base"], mean) for entry in left]
    seconds, size = _makespan(each, jobs), sum(cost.size for cost in each)
    folder = next(parent for parent in Path(body[0]["run"]).resolve().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    amount = f"{size / 2**20:,.0f} MiB of {free / 2**20:,.0f} free"
    if not finished:
        text = (
            f"estimate, from a few steps timed here on random weights: about {duration(seconds)} with --jobs {jobs}, "
            f"and {amount}; finetuning is counted at the dense network's speed"
        )
    else:
        text = (
            f"a finished task took {duration(mean.seconds)} and {mean.size / 2**20:,.1f} MiB here (mean of "
            f"{len(finished)}): the others about {duration(seconds)} with --jobs {jobs} if each task has as many cores "
            f"as those had, and {amount}"
        )
    estimated = sorted({entry["base"] for entry in left if entry["task"] in probed})
    unknown = sorted({entry["base"] for entry in left if entry["base"] in unlike and entry["task"] not in probed})
    if finished and estimated:
        text += f"; no task of {', '.join(estimated)} is finished yet: estimated from a few steps timed here"
    if unknown:
        text += f"; no task of {', '.join(unknown)} is finished yet: it may take another time"
    return text + "".join(f"; {note}" for note in notes)


def _mean(costs: Sequence[Cost]) -> Cost:
    count = len(costs)
    return Cost(sum(cost.seconds + cost.dense_s for cost in costs) / count, sum(cost.size for cost in costs) / count)


def _makespan(costs: Sequence[Cost], jobs: int) -> float:
    """Seconds until the last task ends; each goes to the place that is free first, as it will be run."""
    free_at, trained = [0.0] * jobs, set[str]()
    for cost in costs:
        dense_s = 0.0 if cost.dense in trained else cost.dense_s
        trained |= {cost.dense} - {""}
        heapq.heapreplace(free_at, free_at[0] + cost.seconds + dense_s)
    return max(free_at)


def _finished(folder: Path) -> Cost:
    """Seconds of a finished run's stages by its ledger, and bytes of its files."""
    lines = [line for line in map(unseal, read_text(folder / "ledger.jsonl").splitlines()) if line and "stage" in line]
    seconds = {line["stage"]: line.get("seconds", 0.0) for line in lines}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Cost(sum(seconds.values()), size)


def _probe(recipes: Mapping[int, Recipe], jobs: int) -> tuple[dict[int, Cost], str, list[str]]:
    """Number of a task -> its estimated cost, the last problem that prevented one, and what is not counted."""
    costs: dict[int, Cost] = {}
    problem, notes = "no task could be timed", set[str]()
    speeds: dict[str, Speed | None] = {}
    for number, recipe in recipes.items():
        key = canonical(_written(recipe, "backbone", "data", "task"))
        if key not in speeds and len(speeds) < KINDS:
            from dist_prune.cli.speed_probe import measure_speed  # torch

            try:
                speeds[key] = measure_speed(recipe, jobs)
            except PruneError as error:
                speeds[key], problem = None, str(error)
        speed = speeds.get(key)
        if speed is not None:
            costs[number] = _predict(recipe, speed, notes)
    return costs, problem, sorted(notes)


def _written(recipe: Recipe, *sections: str) -> dict[str, Any]:
    body = recipe.written()
    return {name: body.get(name) for name in sections}


def _predict(recipe: Recipe, speed: "Speed", notes: set[str]) -> Cost:
    """The cost of a task at a speed; ``notes`` takes what is not counted."""
    schedule, networks = recipe.schedule, 3 + bool(recipe.repairs)

    def training(settings: Any, epochs: int) -> float:
        images = speed.train_images if settings.images is None else min(settings.images, speed.train_images)
        held = settings.holdout if settings.selection == "holdout" else 0.0
        judged = images * held if settings.selection == "holdout" else speed.eval_images
        return epochs * (images * (1 - held) * speed.train_s + judged / settings.evaluate_every * speed.eval_s)

    finetuned = recipe.finetune.epochs * recipe.reruns + (schedule.rounds - 1) * schedule.finetune_epochs
    images = speed.train_images if recipe.score.images == "all" else min(recipe.score.images, speed.train_images)
    passes = speed.score_passes
    if passes is None:
        notes.add(f"the scoring of {recipe.method['name']} is not counted")
    for what, present in (
        ("the search", recipe.select.search), ("score.compare", recipe.score.compare),
        ("information.curves", recipe.information.curves != "none"), ("the repair", recipe.repairs),
    ):  # fmt: skip
        if present:
            notes.add(f"{what} is not counted")
    timed = sum(batch * (3 + 2 * recipe.report.latency_repeats) for batch in recipe.report.latency_batches)
    seconds = (
        speed.begin_s
        + training(recipe.finetune, finetuned)
        + schedule.rounds * (passes or 0) * images * speed.eval_s
        + networks * (speed.eval_images * speed.eval_s + timed * speed.forward_s)
    )
    dense = canonical({**_written(recipe, "backbone", "data", "task", "train"), "seed": recipe.seed})
    size = 2**20 + (networks + 1) * speed.weight_bytes  # dense, pruned, (repaired,) finetuned, the bundle
    return Cost(seconds, size, training(recipe.train, recipe.train.epochs), dense)
