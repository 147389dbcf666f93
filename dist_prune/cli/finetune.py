"""``dist-prune finetune``: train the network of a bundle further by a recipe, and write a new bundle.

It runs in one process or in many: ``torchrun --nproc_per_node 2 -m dist_prune.cli finetune ...`` (or ``accelerate
launch -m``).
"""

import argparse
from pathlib import Path
from typing import Any

from dist_prune.cli import composed_run
from dist_prune.cli.prune import bundle_section
from dist_prune.cli.verb import Answer, add_overrides
from dist_prune.config import safe_parsing
from dist_prune.config.recipe_files import find
from dist_prune.errors import PruneError

DROPPED = ("select", "target", "schedule")  # sections of a recipe that choose channels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("bundle", help="a bundle's folder, or a run directory with one")
    parser.add_argument("--recipe", required=True, help="a YAML file, or a name in recipes/")
    parser.add_argument("--output", help="the run directory to make (default: runs/<recipe's name>_finetuned)")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Make the recipe that starts from the bundle, run it, and show the table.

    Raises:
        PruneError: the bundle or the recipe is refused, or their classes differ and no training makes a new head.
    """
    path = find(arguments.recipe)
    tree: Any = safe_parsing.read_yaml(path)
    if not isinstance(tree, dict):
        raise PruneError(f"{path}: a recipe is a mapping of sections (backbone, data, method, ...)")
    own = tree.get("backbone")
    named = own if isinstance(own, dict) else {}
    section = bundle_section(Path(arguments.bundle).expanduser(), named.get("name"))
    if named.get("name") == section["name"]:  # the dense network's weights teach it
        section |= {key: named[key] for key in named if key.startswith(("checkpoint", "pretrained"))}
    name = f"{tree.get('name', path.stem)}_finetuned"
    tree = {key: value for key, value in tree.items() if key not in DROPPED}
    # the bundle is trained already: a new head needs train.epochs on the command line
    tree |= {"name": name, "backbone": section, "select": {"plan": section["bundle"]}, "train": {"epochs": 0}}
    tree["method"] = {"name": "l1"}  # nothing is scored; the new bundle names the method that cut the network
    recipe = composed_run.load_tree(tree, arguments.overrides)
    if not recipe.finetune.epochs:
        raise PruneError(f"finetune.epochs: {path} trains for 0 epochs; write finetune.epochs=N")
    output = Path(arguments.output or f"runs/{recipe.name}")
    end = "bundle  {bundle}\nnext    dist-prune export {bundle} --help   (ONNX, torch.export)"
    return composed_run.run_recipe(recipe, output, arguments, {"dense": "start", "finetuned": "finetuned"}, end)
