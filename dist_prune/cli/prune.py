"""``dist-prune prune``: from a network's weights and a folder of images to a pruned bundle, nothing finetuned.

It runs in one process or in many: ``torchrun --nproc_per_node 2 -m dist_prune.cli prune ...`` (or ``accelerate launch
-m``). All make one plan.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from dist_prune.cli import composed_run, found_images, network_labels
from dist_prune.cli.verb import Answer, add_overrides, bundle_folder
from dist_prune.config.recommendation import IMAGES
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json

TOLERANCE = 0.05  # channels go in steps, which are coarse in small networks
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder as timm and the hub write it
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".th", ".tar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument(
        "weights", help="a file of weights, a folder with config.json and weights as timm writes it, or a bundle"
    )
    parser.add_argument("--backbone", help="timm's name of the network; a folder with config.json or a bundle knows it")
    parser.add_argument(
        "--data",
        required=True,
        help="folder of images: <class>/<image>, also below train and val; or images without classes",
    )
    parser.add_argument("--target", default="macs=0.5", metavar="COST=SHARE", help="what is kept (default: macs=0.5)")
    parser.add_argument("--method", default="auto", help="name of the method (default: the recommended one)")
    parser.add_argument("--output", required=True, help="the run directory to make; its folder export is the bundle")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Make the recipe, run it, and show the table.

    Raises:
        PruneError: the weights, the images or the target are refused.
    """
    output, folder = Path(arguments.output), Path(arguments.data).expanduser()
    bare = found_images.unlabelled(folder) or []  # images without classes
    data, one_split = (network_labels.data_section(output), False) if bare else found_images.find_layout(folder)
    method = IMAGES.method if bare and arguments.method == "auto" else arguments.method
    backbone = backbone_section(Path(arguments.weights).expanduser(), arguments.backbone)
    # new weights in closed form, without labels and training; a bundle's dense network is not at hand for it
    mend = {"finetune": {"recalibrate_bn": 500}} if "bundle" in backbone else {"repair": {"method": "least_squares"}}
    tree: dict[str, Any] = {
        "name": output.resolve().name,
        "backbone": backbone,
        "data": data,
        "score": {"images": 500},
        "method": {"name": method},
        "select": {"scope": "global", "max_ratio": 0.9},
        "target": {**composed_run.parse_target(arguments.target), "tolerance": TOLERANCE},
        **mend,
        "report": {"latency_batches": [1], "trackers": []},
    }
    recipe = composed_run.load_tree(tree, arguments.overrides)
    start = "start" if recipe.backbone.bundle else "dense"
    mended = "repaired" if recipe.repairs else "recalibrated"
    columns = {"dense": start, "pruned": "pruned", "finetuned": mended}
    same = (
        "\nThe images have one split: the same ones ranked the channels and measured top-1, so it is too good."
        if one_split
        else ""
    )
    if bare:
        same = (
            f"\nThe {len(bare):,} images have no classes: the network's own answers took their place. So top-1 is "
            f"the share of images on which a network answers as the {start} one does."
        )
    end = (
        "bundle  {bundle}" + f"{same}\n"
        "next    dist-prune finetune {bundle} --recipe RECIPE   (a recipe for these images: dist-prune new --data "
        f"{arguments.data} --backbone {recipe.backbone.name})"
    )
    answer = partial(network_labels.write_answers, recipe, folder) if bare else None
    return composed_run.run_recipe(recipe, output, arguments, columns, end, answer)


def backbone_section(weights: Path, name: str | None) -> dict[str, Any]:
    """The recipe's section ``backbone`` for weights by what they are.

    Args:
        weights: a file, a folder as timm writes it, a bundle or a run directory.
        name: the network's name, if the user gives one.

    Raises:
        PruneError: there is nothing, or the network's name is unknown or another.
    """
    if not weights.exists():
        raise PruneError(f"there is no file or folder {weights}. Name the weights, or a bundle")
    if weights.is_file():
        if not name:
            raise PruneError(f"--backbone: {weights} does not say which network it is of; name it (resnet18)")
        return {"name": name, "checkpoint": str(weights)}
    if (weights / "bundle.json").is_file() or (weights / "export" / "bundle.json").is_file():
        section = bundle_section(weights)
        if name not in (None, section["name"]):
            raise PruneError(f"--backbone: the bundle {weights} is of {section['name']}, not of {name}; leave it out")
        return section
    config = read_json(weights / "config.json") if (weights / "config.json").is_file() else {}
    told = config.get("architecture")
    name = name or (told if isinstance(told, str) else None)
    if not name:
        raise PruneError(f"--backbone: {weights} has no config.json with an 'architecture'; name the network")
    files = [weights / file for file in WEIGHT_FILES if (weights / file).is_file()]
    files = files or sorted(file for file in weights.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1 and not (files and files[0].name == WEIGHT_FILES[0]):
        names = ", ".join(file.name for file in files[:4])
        what = f"{len(files)} files of weights ({names})" if files else "no weights"
        raise PruneError(f"{weights} holds {what}; name one file")
    kwargs = config.get("model_args")
    return {"name": name, "checkpoint": str(files[0]), **({"kwargs": kwargs} if isinstance(kwargs, dict) else {})}


def bundle_section(folder: Path, named: str | None = None) -> dict[str, Any]:
    """The recipe's section ``backbone`` of a run that starts from a bundle.

    Args:
        folder: of the bundle, or of a run.
        named: the network that the user's own recipe names; None: none.

    Raises:
        PruneError: there is no such bundle, it is damaged, or its network is made by code that the user did not name.
    """
    from dist_prune import models
    from dist_prune.export.bundle import read_bundle

    folder = bundle_folder(str(folder)) or folder
    spec = read_bundle(folder).body["backbone"]
    if models.is_code(spec["name"]) and spec["name"] != named:
        raise PruneError(
            f"this bundle's network is made by {spec['name']}, which is not run because a file says so. Name it "
            f"yourself: dist-prune finetune takes a recipe with backbone.name={spec['name']}"
        )
    return {"name": spec["name"], "kwargs": spec["kwargs"], "bundle": str(folder)}
