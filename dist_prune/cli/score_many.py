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
    parser.add_argument("--run-dir", help="folder for dense weights and scores (default: runs/<recipe's name>)")


def run(arguments: argparse.Namespace) -> Answer:
    """Train or load the dense network, score, prune by each method, evaluate, and make a table.

    Raises:
        PruneError: if fewer than two methods are named, one cannot be compared so, or the run fails.
    """
    from dist_prune.distributed import preemption
    from dist_prune.distributed.environment import DistributedEnvironment
    from dist_prune.pipeline.ledger import lock_run_directory
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
    with lock_run_directory(folder):
        run(recipe, folder, environment, until="many")
    body = json.loads(artifact(folder, "criteria.json").read_text())
    table, count, where = body["table"], body["images"]["count"], body["images"]["where"]
    page = folder / "criteria.html"
    write_atomic(page, render_criteria(recipe.name, recipe.backbone.name, table, task.description(), count, where))
    return f"{as_text(table, f'{count} {where}', task)}\n\npage: {page}", table, 0


def _compared(names: list[str]) -> str:
    return f"score.compare=[{','.join(names)}]"


def comparable_methods() -> list[str]:
    """The methods that can be compared in one pass: all that rank channels and train no weights meanwhile."""
    kinds = {name: methods.find(name) for name in methods.list_names()}
    return [name for name, kind in kinds.items() if issubclass(kind, RankingMethod) and not kind.trains_weights]


def as_text(table: list[dict[str, Any]], images: str, task: Task = CLASSIFICATION) -> str:
    """The comparison for a terminal: the primary figure after surgery, costs, and overlap of the kept channels.

    Args:
        table: a row for each method, as in ``criteria.json``.
        images: number and origin of the images that the figure was measured on.
        task: the recipe's task.
    """
    names = [row["method"] for row in table]
    width = max(map(len, names))
    costs = [cost for cost in report_costs() if cost.name in table[0]]
    heads = [f"{cost.title:>{max(5, len(cost.title))}}" for cost in costs]
    figure = PrimaryFigure.of(task.description())
    title = figure.title if len(figure.title) > 5 else f"{figure.title:>8}"
    repaired = ["repaired"] * ("repaired" in table[0])
    head = [f"{'':{width}}  {title}", *repaired, *heads, *(f"{name:>{max(6, len(name))}}" for name in names)]
    lines = ["  ".join(head)]
    for row in table:
        overlaps = [f"{row['overlap'][name]:{max(6, len(name))}.2f}" for name in names]
        sizes = [f"{row[cost.name]:{len(head)}.3f}" for cost, head in zip(costs, heads, strict=True)]
        after = [f"{figure.number(row['repaired']):>8}"] if repaired else []
        cells = [
            f"{row['method']:{width}}  {figure.number(row[task.primary]):>{len(title)}}",
            *after,
            *sizes,
            *overlaps,
        ]
        lines.append("  ".join(cells))
    lower = "" if figure.higher_is_better else " (lower is better)"
    legend = (
        "columns: kept channels that both methods keep, of those that either keeps",
        f"{figure.name}{lower}: on {images}",
    )
    return "\n".join([*lines, "", *legend])
