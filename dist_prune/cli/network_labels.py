"""Images without classes for ``dist-prune prune``: the dense network's own answers take the place of labels.

Top-1 is then the share of images on which a network answers as the dense one does. The answers are a split as CSV in
the run directory (``answers/``), which the run reads like any other.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_prune import models
from dist_prune.cli.found_images import unlabelled
from dist_prune.config.data import Backbone
from dist_prune.config.recipe import Recipe
from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.export.bundle import read_bundle
from dist_prune.fileio import digest, read_json, write_atomic
from dist_prune.models.load_checkpoint import classifier_names, load_checkpoint, read_named
from dist_prune.pipeline.images import RunImages
from dist_prune.pipeline.start_network import StartNetwork
from dist_prune.training.tracking import Tracker

FOLDER, CLASSES, DONE = "answers", "classes.txt", "answered.json"
JUDGE_EVERY = 4  # every so many-th image measures agreement; the others score and repair
FEWEST = 8  # with fewer images all of them do both
BATCH = 32


def data_section(output: Path) -> dict[str, Any]:
    """Keys of the recipe's ``data`` section for the answers in a run directory."""
    place = output.resolve() / FOLDER
    return {
        "source": "imagefolder", "root": str(place), "train_split": "calibrate", "eval_split": "judge",
        "class_map": str(place / CLASSES),
    }  # fmt: skip


def write_answers(recipe: Recipe, images: Path, folder: Path, environment: DistributedEnvironment) -> None:
    """Write what the network answers on images without classes; a collective, called by every rank.

    Args:
        recipe: its section ``data`` is that of ``data_section``.
        images: the folder of the images.
        folder: the run directory; answers of the same images and network are kept.
        environment: the processes of the run.

    Raises:
        PruneError: there is no image, or the weights do not fit the network.
    """
    comm, place = environment.comm, folder / FOLDER

    def prepare() -> list[str]:
        """The key of the answers and the files; nothing if the answers are there."""
        files = [str(path.resolve()) for path in unlabelled(images) or []]
        names = class_names(recipe.backbone)
        spec = recipe.backbone.model_dump(mode="json")
        key = digest(json.dumps([files, [Path(file).stat().st_size for file in files], names, spec]))
        if read_json(place / DONE).get("key") == key:
            return []
        place.mkdir(parents=True, exist_ok=True)
        (place / DONE).unlink(missing_ok=True)
        write_atomic(place / CLASSES, "".join(f"{name}\n" for name in names))
        _write(place, files, [names[number % len(names)] for number in range(len(files))])  # so that images open
        return [key, *files]

    asked = comm.broadcast_object(comm.run_on_main(prepare))
    if not asked:
        return
    key, *files = asked
    found = _answers(recipe, environment)
    if missing := [file for file in files if file not in found]:
        raise PruneError(f"--data: {missing[0]} cannot be read (and {len(missing) - 1} others); remove them")

    def finish() -> None:
        _write(place, files, [found[file] for file in files])
        write_atomic(place / DONE, json.dumps({"key": key, "images": len(files)}))

    comm.run_on_main(finish)


def class_names(spec: Backbone) -> list[str]:
    """The class names of the network, or its classes' numbers.

    Args:
        spec: the recipe's section ``backbone``, with a bundle or a checkpoint.

    Raises:
        PruneError: the head's size cannot be read from the weights.
    """
    if spec.bundle:
        return list(read_bundle(Path(spec.bundle).expanduser()).body["classes"])
    path = Path(str(spec.checkpoint)).expanduser()
    config = read_json(path.parent / "config.json")
    named = config.get("label_names")
    if isinstance(named, list) and named and len(set(map(str, named))) == len(named):
        return [str(name) for name in named]
    model = models.create(spec.name, 2, 3, False, spec.kwargs)
    wanted, head = model.state_dict(), classifier_names(model)
    weights = read_named(path, spec, wanted, lambda text: None)
    sizes = {weights[name].shape[0] for name in head if name in weights and weights[name].ndim}
    if len(sizes) != 1:
        raise PruneError(
            f"--data: the images have no classes, and the head of {path} does not tell their number. Sort the images "
            "into class folders"
        )
    count = sizes.pop()
    return [str(number).zfill(len(str(count - 1))) for number in range(count)]


def _write(place: Path, files: Sequence[str], labels: Sequence[str]) -> None:
    few = len(files) < FEWEST
    for split, chosen in (
        ("judge", [n for n in range(len(files)) if few or n % JUDGE_EVERY == 0]),
        ("calibrate", [n for n in range(len(files)) if few or n % JUDGE_EVERY]),
    ):
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("filename", "label"))
        rows.writerows((files[number], labels[number]) for number in chosen)
        write_atomic(place / f"{split}.csv", text.getvalue())


def _answers(recipe: Recipe, environment: DistributedEnvironment) -> dict[str, str]:
    """File -> the class that the dense network answers, for the images of both splits."""
    images, comm = RunImages(recipe, environment, Tracker(False)), environment.comm
    model = _network(recipe, images).to(environment.device).eval()
    found: dict[str, str] = {}
    for train in (True, False):
        loader, source = images.loader(train), images.splits[train].source
        own = shard(micro_batches(np.arange(len(source.labels)), BATCH), comm.rank, comm.world)
        with torch.no_grad():
            for batch in loader.batches(own):
                numbers = model(batch.images).argmax(1).tolist() if len(batch.ids) else []
                located = (source.location(int(number)) for number in batch.ids)
                found |= {str(file): images.classes[number] for file, number in zip(located, numbers, strict=True)}
    images.close_loaders()
    return {file: name for part in comm.all_gather_object(found) for file, name in part.items()}


def _network(recipe: Recipe, images: RunImages) -> nn.Module:
    spec = recipe.backbone
    if spec.bundle:
        return StartNetwork(spec, recipe.seed).create(images.classes, images.in_channels)
    model = models.create(spec.name, len(images.classes), images.in_channels, False, spec.kwargs)
    path = Path(str(spec.checkpoint)).expanduser()
    load_checkpoint(model, path, spec, len(images.classes), False, lambda text: None)
    return model
