"""``dist-prune plan``: read a plan from a run or a file, summarise it, write it to files.

A file is a plan.json, or pruning information in the form {layer: {saved_idxs, mask_num}} that the authors of the
redundancy-graph method exchange.
"""

import argparse
import json
from pathlib import Path

from dist_prune import methods
from dist_prune.cli.verb import Answer, add_overrides
from dist_prune.config import loading
from dist_prune.errors import PruneError, nearest, shown

# networks of the authors' whose convolutions have the same names here; torchvision's, except for the DenseNet
SAME_NAMES = ("densenet40_cifar", "resnet50", "vgg16_bn", "vgg19_bn", "vgg16_bn_pool7", "vgg19_bn_pool7")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("source", help="a run directory with a plan, or a recipe (with --from-json)")
    add_overrides(parser)
    parser.add_argument(
        "--from-json", metavar="FILE", help="pruning information or a plan.json for the source's network"
    )
    parser.add_argument("--to-json", metavar="FILE", help="write the plan as pruning information")
    parser.add_argument(
        "--names", choices=("here", "authors"), default="here",
        help="names of layers in --to-json: this package's, or those of the authors' program",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write the plan as plan.json; select.plan=FILE replays either")


def run(arguments: argparse.Namespace) -> Answer:
    """Read a plan, say what it leaves of the network, and write it in the forms asked for.

    Raises:
        PruneError: if there is no plan, or it does not fit the network.
    """
    from dist_prune.cli.check import trace_backbone
    from dist_prune.fileio import write_atomic
    from dist_prune.pruning.plan import files
    from dist_prune.pruning.plan.saved_idxs import to_saved_idxs
    from dist_prune.pruning.selection import plan_summary

    run_dir = Path(arguments.source)
    is_run = (run_dir / "recipe.yaml").is_file()
    recipe_file = str(run_dir / "recipe.yaml") if is_run else arguments.source

    def load_recipe():
        return loading.load(recipe_file, arguments.overrides, methods.options_of, need_environment=False)

    recipe = load_recipe() if is_run else None
    name = f"round_{recipe.schedule.rounds if recipe else 1}/plan.json"
    file = Path(arguments.from_json) if arguments.from_json else run_dir / name
    if not arguments.from_json and not file.is_file():
        raise PruneError(
            f"{arguments.source} is no run directory with a plan ({name}). For a recipe, name the plan's file: "
            f"dist-prune plan {arguments.source} --from-json FILE"
        )
    recipe = recipe or load_recipe()
    graph, classes, assumed = trace_backbone(recipe, methods.build(recipe.method))
    said: list[str] = []
    plan = files.read_plan(file, graph, said.append)
    backbone = recipe.backbone.name
    body = plan_summary.summarize_plan(plan, graph) | {
        "backbone": backbone,
        "classes": classes,
        "assumed": assumed,
        "said": said,
    }
    text = f"{backbone}, {classes} classes" + (f" (assumed {assumed})" if assumed else "")
    text = "\n".join([*said, text, plan_summary.as_text(body)])
    if arguments.to_json:
        names = _graph_names(backbone) if arguments.names == "authors" else {}
        write_atomic(Path(arguments.to_json), json.dumps(to_saved_idxs(plan, graph, names)))
        text += f"\nwrote {arguments.to_json}"
    if arguments.out:
        write_atomic(Path(arguments.out), plan.to_json())
        text += f"\nwrote {arguments.out}"
    return text, body, 0


def _graph_names(backbone: str) -> dict[str, str]:
    """Layer -> its name in the redundancy-graph authors' program, where it differs.

    Raises:
        PruneError: their program has no such network.
    """
    from dist_prune.models.authors_names import NETWORKS, names_of

    own = next((names for names in names_of(backbone) if names.program == "graph"), None)
    base = backbone.removeprefix("torchvision:").partition(".")[0]
    if own is None and base not in SAME_NAMES:
        known = [*(name for name, all_names in NETWORKS.items() if all_names[0].program == "graph"), *SAME_NAMES]
        raise PruneError(
            f"--names authors: the redundancy-graph authors have no network like {shown(backbone)}."
            f"{nearest(base, known)} They have {', '.join(known)}; --names here writes this network's names"
        )
    return own.theirs if own else {}
