"""Checks that ``dist-prune check`` and the start of a run share: missing files and contradicting keys.

Both report the same texts, so a recipe that passes ``check`` passes at the start of a run.
"""

from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune import methods
from dist_prune.config.data import SHARDS, Data
from dist_prune.config.recipe import Recipe
from dist_prune.config.training import Training
from dist_prune.data.datasets import KNOWN, OPENERS, DatasetKeys, open_source
from dist_prune.data.listed_layouts import find_listing
from dist_prune.data.open_split import beton_path
from dist_prune.data.random_access import TARGETS, ImageSource, target_kind
from dist_prune.errors import PruneError
from dist_prune.fileio import folder_trouble
from dist_prune.methods.base import Method
from dist_prune.models.load_checkpoint import load_checkpoint
from dist_prune.pipeline.ledger import Ledger
from dist_prune.pipeline.networks import check_teacher
from dist_prune.pipeline.search_checks import check_search, read_front
from dist_prune.pruning.network_output import shaped_output
from dist_prune.pruning.plan import files
from dist_prune.pruning.selection import cost
from dist_prune.tasks.base import Task
from dist_prune.training import optim, optimizer_state

TARGETS_OF = {  # source -> what it gives
    "maskfolder": "masks",
    "boxfolder": "boxes",
    "coco": "boxes",
    "npz_labels": "labels",
    "npz_values": "values",
    "images": "nothing",
}
ASSUME = "dist-prune check --assume RECIPE leaves out what is only on another machine"


def missing_files(recipe: Recipe, done: Container[str] = ()) -> list[str]:
    """Find the files that the recipe needs and that are missing here.

    Args:
        recipe: The validated recipe.
        done: Names of finished stages ("train", "score"), whose input files are no longer needed.

    Returns:
        A line for each missing file or folder.
    """
    missing: list[str] = []
    backbone = recipe.backbone
    if "train" not in done:
        if backbone.checkpoint and not Path(backbone.checkpoint).expanduser().is_file():
            missing.append(f"backbone.checkpoint: there is no file {Path(backbone.checkpoint).expanduser()}")
        if backbone.bundle and bundle_folder_is_missing(Path(backbone.bundle).expanduser()):
            missing.append(f"backbone.bundle: there is no bundle in {Path(backbone.bundle).expanduser()}")
        named = backbone.bundle or backbone.checkpoint or backbone.pretrained
        if not named and recipe.train.epochs == 0:
            missing.append(
                "there is no dense network: set backbone.checkpoint=FILE, or train.epochs to train one, "
                "or backbone.pretrained=true to let timm fetch its weights"
            )
    if recipe.score.from_ and not recipe.select.plan and "score" not in done:
        missing += _failing(finished_scores, Path(recipe.score.from_))
    if recipe.select.from_:
        missing += _failing(read_front, recipe)
    if recipe.select.plan:
        plan_file = files.manifest_of(Path(recipe.select.plan).expanduser())
        missing += [] if plan_file.is_file() else [f"select.plan: there is no plan file {plan_file}"]
    return missing


def staging_trouble(data: Data) -> list[str]:
    """Say why images cannot be copied to ``data.stage_to`` on this machine; a run asks each of its nodes.

    Returns:
        A line, or none.
    """
    if data.stage_to is None or "${" in data.stage_to:  # a variable of the node where it runs
        return []
    trouble = folder_trouble(Path(data.stage_to))
    return [f"data.stage_to: {trouble}. Name a folder of the node's own disk"] if trouble else []


def bundle_folder_is_missing(folder: Path) -> bool:
    """Whether neither a folder nor its ``export`` holds a bundle."""
    return not any((place / "bundle.json").is_file() for place in (folder, folder / "export"))


def missing_image_folders(data: Data) -> list[str]:
    """Find the splits of the recipe's images that are missing here. Folders are not scanned for images.

    Args:
        data: The recipe's ``data`` section.

    Returns:
        A line for each missing split.
    """
    if TARGETS_OF.get(data.source) in ("masks", "boxes", "nothing"):
        splits = {data.train_split: True, data.eval_split: False}
        found = [_failing(open_source, data.source, data.root, split, train) for split, train in splits.items()]
        return list(dict.fromkeys(line for lines in found for line in lines))
    if data.source not in OPENERS:
        return []  # a Dataset is opened by the check verb itself
    if data.source != "imagefolder":
        path = Path(data.path).expanduser() if data.path else None
        opened = data.source in KNOWN or path is None or not path.exists()  # an .npz is read by the check verb itself
        opened = opened or data.source in SHARDS  # its root is a pattern or a list
        splits = {True: data.train_split, False: data.eval_split} if opened else {}
        keys = DatasetKeys.of(data)
        return _failing(
            lambda: [open_source(data.source, data.root, name, train, dataset=keys) for train, name in splits.items()]
        )
    missing: list[str] = []
    root = Path(data.path).expanduser() if data.path else Path()
    for split, train in ((data.train_split, True), (data.eval_split, False)):
        if data.root is not None and (broken := _listing_errors(root, split, train)) is not None:
            missing += broken
            continue
        beton = beton_path(data.source, data.root, split, train)
        if data.root is None or not (root / split).is_dir():
            if beton is None or not beton.is_file() or data.backend not in ("auto", "ffcv"):
                missing += _failing(open_source, data.source, data.root, split, train)
        elif not any(entry.is_dir() for entry in (root / split).iterdir()):
            missing.append(f"data.root: {root / split} has no folders; there is one for each class")
    return list(dict.fromkeys(missing))


def _listing_errors(root: Path, split: str, train: bool) -> list[str] | None:
    """The errors of the file that lists a split's images; None if there is no such file."""
    try:
        return None if find_listing(root, split, train) is None else []
    except PruneError as error:
        return [str(error)]


def finished_scores(other: Path) -> dict[str, Any]:
    """The ledger's line of another run's scores (``score.from``).

    Args:
        other: The other run directory.

    Raises:
        PruneError: It has no finished scores, or their file was altered.
    """
    line = Ledger(other).complete("score")
    if line is None:
        raise PruneError(
            f"score.from: {other} has no finished scores (round_1/scores.safetensors, unchanged since its line in "
            "ledger.jsonl)"
        )
    return line


def training_sections(recipe: Recipe) -> Iterator[tuple[Training, str]]:
    """The recipe's sections that train for at least one epoch, with their names."""
    if recipe.train.epochs:
        yield recipe.train, "train"
    if recipe.finetune.epochs or (recipe.schedule.rounds > 1 and recipe.between.epochs):
        yield recipe.finetune, "finetune"


def contradictions(recipe: Recipe, method: Method, model: nn.Module, classes: int | None) -> list[str]:
    """Find what a run on one process would refuse whatever its images are.

    Args:
        recipe: The validated recipe.
        method: The recipe's method.
        model: The dense backbone. It gets the checkpoint's weights if there is a checkpoint.
        classes: Number of classes of the data, or None if it is unknown; then a checkpoint's head is not checked.

    Returns:
        A line for each problem.
    """
    problems = [
        *_failing(check_rounds, recipe, method, False),
        *_failing(check_teacher, recipe),
        *_failing(check_repair, recipe),
        *_failing(check_search, recipe, method),
    ]
    checkpoint = Path(recipe.backbone.checkpoint).expanduser() if recipe.backbone.checkpoint else None
    if checkpoint is not None and checkpoint.is_file() and not recipe.backbone.bundle:
        arguments = (model, checkpoint, recipe.backbone, classes or 0, classes is None or recipe.train.epochs > 0)
        problems += _failing(load_checkpoint, *arguments, lambda text: None)
    for settings, name in training_sections(recipe):
        problems += _failing(optim.check, model, settings, name)
    return problems


def check_repair(recipe: Recipe) -> None:
    """Check the recipe's ``repair`` section.

    Args:
        recipe: The validated recipe.

    Raises:
        PruneError: The weights that would be repaired are a bundle's, which may have been finetuned.
    """
    plan = recipe.select.plan
    if recipe.repairs and plan and Path(plan).expanduser().is_dir():
        raise PruneError(
            f"repair.method: {recipe.repair_name} repairs what was just cut, and select.plan names a bundle, whose own "
            f"weights are taken as they are. Set {recipe.repair_off}, or name the bundle's plan file"
        )


def task_problems(recipe: Recipe, method: Method, task: Task) -> list[str]:
    """Find what a recipe asks for that makes no sense for its task.

    Args:
        recipe: The validated recipe.
        method: The recipe's method.
        task: The recipe's task.

    Returns:
        A line for each problem.
    """
    needs = {} if recipe.select.plan else {recipe.method["name"]: method.task_needs}
    needs |= {name: methods.find(name).task_needs for name in recipe.score.compare}
    problems = [line for name, each in needs.items() for line in _failing(task.check_method, name, each)]
    for settings, section in training_sections(recipe):
        problems += _failing(task.check_training, settings, section)
    problems += _failing(check_kind, task, TARGETS_OF.get(recipe.data.source, "classes"), recipe.data.source)
    if recipe.information.curves in ("information", "all") and "class labels" not in task.provides:
        problems.append(
            f"information.curves: I(Z;Y) needs one class number for each image, and the task {task.name} has none; "
            "write accuracy, which is its primary figure, or leave the key out"
        )
    return problems


def check_targets(task: Task, source: ImageSource, name: str) -> None:
    """Check that a data set gives what the task learns from.

    Args:
        task: The recipe's task.
        source: The opened training split.
        name: The recipe's ``data.source``.

    Raises:
        PruneError: It gives something else.
    """
    check_kind(task, target_kind(source), name)


def check_kind(task: Task, found: str, name: str) -> None:
    """``check_targets`` for a data set that gives ``found``, a key of ``TARGETS``."""
    if task.targets not in ("anything", found):
        raise PruneError(
            f"task.name: {task.name} learns from {TARGETS[task.targets]}; data.source={name} gives {TARGETS[found]}"
        )


def check_outputs(task: Task, model: nn.Module, example: Tensor, count: int, name: str) -> None:
    """Check that a network gives what the task needs, in training and in evaluation mode.

    Args:
        task: The recipe's task.
        model: The bare network; not changed.
        example: (1, C, H, W) image on its device.
        count: Number of classes or values.
        name: Name of the backbone, for the error.

    Raises:
        PruneError: It gives something else.
    """
    images = torch.cat([example, example])
    for mode in ("evaluation", "training"):
        try:
            outputs = shaped_output(model, images, training=mode == "training")
        except Exception:  # an image size, a norm over single values: other checks report these
            continue
        if wrong := task.check_outputs(outputs, count, images):
            raise PruneError(f"backbone.name: in {mode} mode {name} {wrong}")


def check_rounds(recipe: Recipe, method: Method, zero: bool) -> None:
    """Check the recipe's ``schedule`` section.

    Args:
        recipe: The validated recipe.
        method: The recipe's method.
        zero: Whether DeepSpeed shards the optimizer (ZeRO).

    Raises:
        PruneError: The recipe asks for rounds that make no sense or are not offered.
    """
    schedule = recipe.schedule
    if schedule.rounds == 1:
        if schedule.carry_optimizer:
            raise PruneError("schedule.carry_optimizer: with schedule.rounds 1 there is no round to carry a state to")
        return
    key = f"schedule.rounds: {schedule.rounds} rounds of"
    if method.why_one_shot:
        raise PruneError(f"{key} {recipe.method['name']} make no sense: {method.why_one_shot}. Set it to 1")
    if recipe.select.plan:
        raise PruneError(f"{key} a plan that is replayed (select.plan) make no sense: nothing is scored. Set it to 1")
    target = recipe.target.asked()
    if target and cost.COSTS[target[0]].measured:
        raise PruneError(
            f"{key} target.{target[0]} are not offered: a time is searched for by measuring cut dense networks. "
            f"Set {cost.target_keys()}, or one round"
        )
    if schedule.carry_optimizer and schedule.finetune_epochs == 0:
        raise PruneError("schedule.carry_optimizer: with schedule.finetune_epochs 0 no state is there to be carried")
    if schedule.carry_optimizer:
        optimizer_state.check(recipe.finetune)
    if schedule.carry_optimizer and zero:
        raise PruneError(
            "schedule.carry_optimizer: DeepSpeed shards the optimizer's state, which cannot be pruned; launch without "
            "DeepSpeed, or leave it out (every finetuning then starts with a new optimizer)"
        )


def _failing(check: Callable[..., Any], *arguments: Any) -> list[str]:
    try:
        check(*arguments)
    except PruneError as error:
        return [str(error)]
    return []
