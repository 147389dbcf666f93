"""``dist-prune score-many``: several criteria in one pass over the images, compared at the recipe's target.

It runs in one process. ``run.py`` does the same on many for a recipe with ``score.compare``.
"""

import argparse
import json
from typing import Any, get_args

from dist_prune import methods, tasks
from dist_prune.cli.verb import Answer, add_recipe
from dist_prune.config import loading
from dist_prune.config.pruning import RepairMethod
from dist_prune.errors import PruneError, shown
from dist_prune.fileio import write_atomic
from dist_prune.methods.base import RankingMethod
from dist_prune.pipeline.earlier_artifact_names import artifact
from dist_prune.pipeline.run_directory import run_directory
from dist_prune.pruning.selection.cost import report_costs
from dist_prune.report.cut_speed import place_text, speed_text
from dist_prune.tasks.base import Task
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.primary import PrimaryFigure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    add_recipe(parser)
    parser.add_argument("--methods", required=True, metavar="A,B,C", help="names of methods, or all")
    parser.add_argument(
        "--repair",
        choices=get_args(RepairMethod),
        help="measure each network also repaired so; as repair.method in the recipe (default: the recipe's)",
    )
    parser.add_argument("--no-times", action="store_true", help="do not measure the speed-up of each network")
    parser.add_argument("--run-dir", help="folder for dense weights and scores (default: runs/<recipe's name>)")


def run(arguments: argparse.Namespace) -> Answer:
    """Train or load the dense network, score, prune by each method, evaluate, and make a table.

    Raises:
        PruneError: if fewer than two methods are named, one cannot be compared so, or the run fails.
    """
    from dist_prune.distributed import preemption
    from dist_prune.distributed.environment import DistributedEnvironment
    from dist_prune.pipeline.context import RunContext
    from dist_prune.pipeline.ledger import lock_run_directory
    from dist_prune.pruning.plan.plan import Plan
    from dist_prune.report.criteria_html import render_criteria
    from dist_prune.run import run

    names = arguments.methods.split(",")
    everything = names == ["all"]
    names = comparable_methods() if everything else [name for name in names if name]
    if len(names) < 2 or len(set(names)) < len(names):
        raise PruneError(f"--methods: two or more different ones, got {shown(arguments.methods)}")
    repaired = [f"repair.method={arguments.repair}"] if arguments.repair else []
    overrides = [*arguments.overrides, *repaired, _compared(names)]
    recipe = loading.load(arguments.recipe, overrides, methods.options_of)
    task = tasks.build(recipe.task)
    if everything:  # those that make sense for the recipe's task
        names = [name for name in names if not {*methods.find(name).task_needs} - task.provides]
        recipe = loading.load(arguments.recipe, [*overrides[:-1], _compared(names)], methods.options_of)
    folder = run_directory(arguments.run_dir, f"runs/{recipe.name}")
    preemption.install_handlers()
    environment = DistributedEnvironment.start(
        recipe.cluster.timeout_s, recipe.cluster.tf32, recipe.cluster.deterministic
    )
    if environment.comm.world > 1:
        raise PruneError("score-many is one process; start run.py with score.compare=[...] on many")
    times: dict[str, Any] = {}

    def then(context: RunContext) -> None:
        from dist_prune.analysis.cut_times import times_of_criteria

        context.images.close_loaders()
        plans = json.loads(artifact(folder, "criteria.json").read_text())["plans"]
        place, found = times_of_criteria(context, {name: Plan.from_dict(plan) for name, plan in plans.items()})
        times.update(place=dict(place), criteria=found)

    with lock_run_directory(folder):
        if arguments.no_times:
            run(recipe, folder, environment, until="many")
        else:
            run(recipe, folder, environment, until="many", then=then)
    body = json.loads(artifact(folder, "criteria.json").read_text())
    count, where = body["images"]["count"], body["images"]["where"]
    table = [{**row, **times.get("criteria", {}).get(row["method"], {})} for row in body["table"]]
    place = times.get("place")
    if times:
        write_atomic(folder / "criteria_times.json", json.dumps(times, indent=1))
    page = folder / "criteria.html"
    facts = (task.description(), count, where, place)
    write_atomic(page, render_criteria(recipe.name, recipe.backbone.name, table, *facts))
    return f"{as_text(table, f'{count} {where}', task, place)}\n\npage: {page}", table, 0


def _compared(names: list[str]) -> str:
    return f"score.compare=[{','.join(names)}]"


def comparable_methods() -> list[str]:
    """The methods that can be compared in one pass: all that rank channels and train no weights meanwhile."""
    kinds = {name: methods.find(name) for name in methods.list_names()}
    return [name for name, kind in kinds.items() if issubclass(kind, RankingMethod) and not kind.trains_weights]


def as_text(
    table: list[dict[str, Any]], images: str, task: Task = CLASSIFICATION, times: dict[str, Any] | None = None
) -> str:
    """The comparison for a terminal: the figure after surgery, costs, speed-up, and overlap of the kept channels.

    Args:
        table: a row for each method, as in ``criteria.json``.
        images: number and origin of the images that the figure was measured on.
        task: the recipe's task.
        times: where the networks were timed (``CutTimes.place``); None if they were not.
    """
    names = [row["method"] for row in table]
    width = max(map(len, names))
    costs = [cost for cost in report_costs() if cost.name in table[0]]
    heads = [f"{cost.title:>{max(5, len(cost.title))}}" for cost in costs]
    speed = ["speed-up"] if times is not None else []
    figure = PrimaryFigure.of(task.description())
    title = figure.title if len(figure.title) > 5 else f"{figure.title:>8}"
    repaired = ["repaired"] * ("repaired" in table[0])
    head = [f"{'':{width}}  {title}", *repaired, *heads, *speed, *(f"{name:>{max(6, len(name))}}" for name in names)]
    lines = ["  ".join(head)]
    for row in table:
        overlaps = [f"{row['overlap'][name]:{max(6, len(name))}.2f}" for name in names]
        sizes = [f"{row[cost.name]:{len(head)}.3f}" for cost, head in zip(costs, heads, strict=True)]
        after = [f"{figure.number(row['repaired']):>8}"] if repaired else []
        cells = [
            f"{row['method']:{width}}  {figure.number(row[task.primary]):>{len(title)}}",
            *after,
            *sizes,
            *(f"{speed_text(row):>8}" for _ in speed),
            *overlaps,
        ]
        lines.append("  ".join(cells))
    lower = "" if figure.higher_is_better else " (lower is better)"
    legend = (
        "columns: kept channels that both methods keep, of those that either keeps",
        f"{figure.name}{lower}: on {images}",
        "speed-up: not measured (--no-times)"
        if times is None
        else f"speed-up: dense over cut, {place_text(times)}; ?: not reliable, other work used the machine",
    )
    return "\n".join([*lines, "", *legend])
