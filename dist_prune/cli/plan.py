"""``dist-prune plan``: plans in and out of files, among them pruning information in the form {layer: {saved_idxs,
mask_num}} that the redundancy-graph authors exchange."""

import argparse
import json
from pathlib import Path
from typing import Any

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.errors import PruneError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("source", help="a recipe (with --from-json), or a run directory whose plan is meant")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--from-json", metavar="FILE", help="pruning information or a plan.json, for that network")
    parser.add_argument("--to-json", metavar="FILE", help="write the plan as pruning information")
    parser.add_argument("--out", metavar="FILE", help="write the plan as plan.json; select.plan=FILE replays either")


def run(given: argparse.Namespace) -> tuple[str, Any, int]:
    """Read a plan, say what it leaves of the network, write it in the forms asked for."""
    from dist_prune.cli.check import trace_backbone
    from dist_prune.fileio import write_atomic
    from dist_prune.pruning.plan import files
    from dist_prune.pruning.plan.saved_idxs import to_saved_idxs
    from dist_prune.pruning.selection import plan_summary

    run = Path(given.source)
    in_run = (run / "recipe.yaml").is_file()
    recipe = str(run / "recipe.yaml") if in_run else given.source
    spec = loading.load(recipe, given.overrides, methods.options_of, need_environment=False) if in_run else None
    name = f"round_{spec.schedule.rounds if spec else 1}/plan.json"
    file = Path(given.from_json) if given.from_json else run / name
    if not given.from_json and not file.is_file():
        raise PruneError(
            f"{given.source} is no run directory with a plan ({name}). For a recipe, name the plan's file: "
            f"dist-prune plan {given.source} --from-json FILE"
        )
    spec = spec or loading.load(recipe, given.overrides, methods.options_of, need_environment=False)
    method = methods.build(spec.method)
    graph, classes, assumed = trace_backbone(spec, method)
    plan = files.read_plan(file, graph)
    body = plan_summary.summarize_plan(plan, graph) | {
        "backbone": spec.backbone.name,
        "classes": classes,
        "assumed": assumed,
    }
    text = f"{spec.backbone.name}, {classes} classes" + (f" (assumed {assumed})" if assumed else "")
    text += "\n" + plan_summary.as_text(body)
    written = {given.to_json: lambda: json.dumps(to_saved_idxs(plan, graph)), given.out: plan.to_json}
    for place, content in written.items():
        if place:
            write_atomic(Path(place), content())
            text += f"\nwrote {place}"
    return text, body, 0
