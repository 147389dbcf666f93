"""``dist-prune import-plan``: a plan from the files of a paper's program, and such files from a run."""

import argparse
import re
from pathlib import Path

import numpy as np
import torch

from dist_prune import methods
from dist_prune.cli.verb import Answer
from dist_prune.config import loading
from dist_prune.errors import PruneError, shown

PROGRAMS = ("graph", "sensitivity", "mint", "entropy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("source", help="the recipe of the network, or with --to a run directory")
    parser.add_argument("files", nargs="*", metavar="FILE | key=value", help="the program's files in order, and keys")
    parser.add_argument("--from", dest="origin", choices=PROGRAMS, help="the program that wrote the files")
    parser.add_argument("--to", dest="program", choices=PROGRAMS, help="the program to write a file for")
    parser.add_argument("--out", required=True, metavar="FILE", help="plan.json for select.plan, or the program's file")


def run(arguments: argparse.Namespace) -> Answer:
    """Make the plan of a program's files, say what it leaves of the network, and write it; or write a run's.

    Raises:
        PruneError: neither or both of --from and --to are given, a file cannot be read, or it does not fit the network.
    """
    if (arguments.origin is None) == (arguments.program is None):
        raise PruneError(f"give either --from (import) or --to (export), with one of {', '.join(PROGRAMS)}")
    overrides = [word for word in arguments.files if re.match(r"[a-z_]+(\.\w+)*=", word)]
    files = [Path(word) for word in arguments.files if word not in overrides]
    return _export(arguments) if arguments.program else _import(arguments, files, overrides)


def _import(arguments: argparse.Namespace, files: list[Path], overrides: list[str]) -> Answer:
    from dist_prune.cli import authors_plans
    from dist_prune.cli.check import trace_backbone
    from dist_prune.fileio import write_atomic
    from dist_prune.pruning.plan.files import read_plan
    from dist_prune.pruning.selection import plan_summary
    from dist_prune.pruning.selection.ranking import SelectionRequest

    if not files:
        raise PruneError(f"--from {arguments.origin}: name its files after the recipe")
    for file in files:
        if not file.is_file():
            raise PruneError(f"there is no file {file}")
    recipe = loading.load(arguments.source, overrides, methods.options_of, need_environment=False)
    method = methods.build(recipe.method)
    graph, classes, assumed = trace_backbone(recipe, method)
    request, said = SelectionRequest.of(recipe), list[str]()
    graph = graph.exclude(recipe.select.exclude).restrict_to(request.include)
    if arguments.origin == "graph":
        if len(files) > 1:
            raise PruneError("--from graph: pruning information is one file")
        plan = read_plan(files[0], graph, said.append)
    elif arguments.origin == "sensitivity":
        plan = authors_plans.read_masks(files, graph)
    else:
        if recipe.method["name"] != arguments.origin:
            raise PruneError(
                f"method.name: the files of {arguments.origin} hold scores, of which its method makes the plan; take a "
                f"recipe of it, or method.name={arguments.origin} with its budget (select, target, method.p)"
            )
        if arguments.origin == "mint":
            scores = authors_plans.read_scores(files, graph, method)
        else:
            scores = authors_plans.read_orders(files, graph, recipe.method.get("sampling"), said.append)
        plan = method.select(scores, graph, request)
    body = plan_summary.summarize_plan(plan, graph) | {"classes": classes, "assumed": assumed, "said": said}
    write_atomic(Path(arguments.out), plan.to_json())
    end = f"wrote {arguments.out}; select.plan={arguments.out} replays it"
    return "\n".join([*said, recipe.backbone.name, plan_summary.as_text(body), end]), body, 0


def _export(arguments: argparse.Namespace) -> Answer:
    """Write the plan or the scores of a run in the form of a program's file."""
    from dist_prune.cli.check import trace_backbone
    from dist_prune.distributed import tensor_files
    from dist_prune.methods.mint.mutual_information import mutual_information
    from dist_prune.pruning.plan.plan import Plan

    if arguments.files:
        raise PruneError(
            f"--to {arguments.program}: takes a run directory alone, and {shown(arguments.files[0])} is more; the file "
            "to write is --out"
        )
    place = Path(arguments.source) / "round_1"
    if not (place / "plan.json").is_file():
        raise PruneError(f"{arguments.source} is no run directory with a plan (round_1/plan.json)")
    plan, out = Plan.from_json((place / "plan.json").read_text()), Path(arguments.out)
    if arguments.program == "graph":
        raise PruneError(
            f"--to graph: dist-prune plan {arguments.source} --to-json {out} --names authors writes pruning information"
        )
    recipe = loading.load(str(place.parent / "recipe.yaml"), [], methods.options_of, need_environment=False)
    graph = trace_backbone(recipe, methods.build(recipe.method))[0]
    if arguments.program == "sensitivity":
        masks = [np.isin(np.arange(g.width), plan.kept(g.name)).astype(np.float64) for g in graph.free]
        _save_torch(out, masks)
        names = [group.name for group in graph.free]
        return f"wrote {out}: {len(masks)} masks, of {', '.join(names)}", {"file": str(out), "layers": names}, 0
    if not (place / "scores.safetensors").is_file():
        raise PruneError(f"{place}/scores.safetensors is not there: a replayed plan has no scores to write")
    scores, _ = tensor_files.read_tensors(place / "scores.safetensors")
    kind = {"mint": "edges", "entropy": "order"}[arguments.program]
    names = [name.removesuffix(f":{kind}") for name in scores if name.endswith(f":{kind}")]
    if not names:
        raise PruneError(f"{place}/scores.safetensors holds no scores of {arguments.program}: they are of its method")
    if arguments.program == "entropy":
        _save_torch(out, {f"filter_delete_order_{name}": scores[f"{name}:order"].tolist() for name in names})
    else:
        if out.suffix != ".npz":
            raise PruneError(f"--out: {out} must end in .npz; the program's own .npy needs pickling (docs/papers.md)")
        names = [name for name in graph.layers if f"{name}:edges" in scores]  # the program's pairs are in this order
        tables = [mutual_information(scores[f"{name}:edges"], scores[f"{name}:sizes"]).numpy() for name in names]
        np.savez(out, **{str(number): table for number, table in enumerate(tables)})  # type: ignore[arg-type]
    return f"wrote {out}: {len(names)} entries, of {', '.join(names)}", {"file": str(out), "layers": names}, 0


def _save_torch(file: Path, body: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(body, file)
