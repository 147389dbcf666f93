"""``dist-prune score-many``: several criteria in one pass over the images, compared at the recipe's target.

One process; across many, run.py does the same for a recipe with ``score.compare``.
"""

import argparse
import json
from typing import Any

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.config.compatibility import artifact
from dist_prune.errors import PruneError, shown
from dist_prune.methods.base import RankingMethod
from dist_prune.pipeline.run_directory import run_directory
from dist_prune.pruning.selection.cost import report_costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("recipe", help="a YAML file, or a name in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--methods", required=True, metavar="A,B,C", help="names of methods, or all")
    parser.add_argument("--run-dir", help="where dense weights and scores are kept (default: runs/<recipe's name>)")


def run(given: argparse.Namespace) -> tuple[str, Any, int]:
    """Train or load the dense network, score, prune by each method, evaluate; the table."""
    from dist_prune.distributed import preemption
    from dist_prune.distributed.environment import DistributedEnvironment
    from dist_prune.pipeline.ledger import lock_run_directory
    from dist_prune.run import run

    names = comparable_methods() if given.methods == "all" else [name for name in given.methods.split(",") if name]
    if len(names) < 2 or len(set(names)) < len(names):
        raise PruneError(f"--methods: two or more different ones, got {shown(given.methods)}")
    words = [*given.overrides, f"score.compare=[{','.join(names)}]"]
    recipe = loading.load(given.recipe, words, methods.options_of)
    folder = run_directory(given.run_dir, f"runs/{recipe.name}")
    preemption.install_handlers()
    environment = DistributedEnvironment.start(
        recipe.cluster.timeout_s, recipe.cluster.tf32, recipe.cluster.deterministic
    )
    if environment.comm.world > 1:
        raise PruneError("score-many is one process; start run.py with score.compare=[...] on many")
    with lock_run_directory(folder):
        run(recipe, folder, environment, until="many")
    body = json.loads(artifact(folder, "criteria.json").read_text())
    table, images = body["table"], f"{body['images']['count']} {body['images']['where']}"
    return as_text(table, images), table, 0


def comparable_methods() -> list[str]:
    """The methods that can be compared so: all that rank channels and train no weights meanwhile."""
    found = {name: methods.find(name) for name in methods.list_names()}
    return [name for name, kind in found.items() if issubclass(kind, RankingMethod) and not kind.trains_weights]


def as_text(table: list[dict[str, Any]], images: str) -> str:
    """Accuracy after surgery on ``images``, what is left, and what share of the kept channels two methods have in
    common."""
    names = [row["method"] for row in table]
    wide = max(map(len, names))
    costs = [cost for cost in report_costs() if cost.name in table[0]]
    heads = [f"{cost.title:>{max(5, len(cost.title))}}" for cost in costs]
    head = [f"{'':{wide}}  top-1 %", *heads, *(f"{name:>{max(6, len(name))}}" for name in names)]
    lines = ["  ".join(head)]
    for row in table:
        shared = [f"{row['overlap'][name]:{max(6, len(name))}.2f}" for name in names]
        sizes = [f"{row[cost.name]:{len(head)}.3f}" for cost, head in zip(costs, heads, strict=True)]
        lines.append("  ".join([f"{row['method']:{wide}}  {row['top1']:7.2f}", *sizes, *shared]))
    end = ("columns: kept channels that both methods keep, of those that either keeps", f"top-1: on {images}")
    return "\n".join([*lines, "", *end])
