"""Inputs of a stage from outside the run directory (images, their storage form, a checkpoint) must stay unchanged."""

import json

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.fileio import digest, file_digest, read_json, write_atomic
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.stage_graph import judges

STARTED = "stage_started.json"  # describes the running stage: an interrupted one has no line in the ledger
KEYS = {
    "bundle": "backbone.bundle",
    "checkpoint": "backbone.checkpoint",
    "train": "data.root (training images)",
    "eval": "data.root (test images)",
    "network": "backbone.name (the content of its files)",
}
_BUILDING = ("train", "many", "score", "select", "prune", "finetune", "evaluate", "curves", "export")


def digests(context: RunContext, stage: str) -> dict[str, str]:
    """Digests of what a stage reads from outside the run directory: images and labels, the checkpoint file.

    Args:
        context: The run.
        stage: The stage's name (not its label).

    Returns:
        ``train`` and ``eval`` -> identity of the split; ``checkpoint`` -> sha256 of the file, or "missing";
        ``network`` -> digest of the files that ``backbone.name`` leads to. Only those that the stage reads.
    """
    scored = (context.method.calibration_split != "test",)
    splits = {
        "train": (True, False), "many": (True, False), "finetune": (True, False), "score": scored, "repair": (True,),
        "evaluate": (False,), "curves": (False,),
        "select": (True,) if judges(context.recipe) else (),
    }.get(stage, ())  # fmt: skip
    out = {("train" if train else "eval"): context.images.splits[train].source.identity for train in splits}
    file = context.networks.checkpoint
    if stage == "train" and file is not None:
        out["checkpoint"] = file_digest(file) if file.is_file() else "missing"
    if stage in _BUILDING:
        files = models.source_files(context.recipe.backbone.name)
        if stage != "train":  # later ones read the weights of this run
            files = [path for path in files if path.suffix != ".safetensors"]
        content = "".join(file_digest(path) for path in files)
        out |= {"network": digest(content)} if files else {}
    if stage == "train" and context.networks.start is not None:
        out["bundle"] = context.networks.start.digest()
    return out


def record_start(stage: str, context: RunContext, outside: dict[str, str]) -> None:
    """Record the external inputs that a stage starts with.

    Args:
        stage: The stage's label.
        context: The run.
        outside: See ``digests``.
    """
    write_atomic(context.path(STARTED), json.dumps({"stage": stage, "outside": outside}))


def check_unchanged(stage: str, context: RunContext, outside: dict[str, str]) -> None:
    """Check that a stage was made from the images and the checkpoint that the recipe names now.

    A stage that was started and not finished may start over with other images. It must not do so silently because a
    .beton file, which stores the same images in another form, appeared or disappeared in the meantime.

    Args:
        stage: The stage's label.
        context: The run.
        outside: See ``digests``; those of today.

    Raises:
        PruneError: They have changed.
    """
    line = context.ledger.last(stage)
    before = (line or _read_start(stage, context)).get("outside", outside)
    differing = [name for name in sorted(outside.keys() & before.keys()) if outside[name] != before[name]]
    repacked = [name for name in differing if _images(outside[name]) == _images(before[name])]
    if repacked:
        # the identity of images in a lossy .beton contains a colon (data/ffcv/backend.py)
        lossy_now = any(":" in outside[name] for name in repacked)
        splits = " and ".join({"train": "training", "eval": "evaluation"}[name] for name in repacked)
        raise PruneError(
            f"data.backend: the {splits} images are those that the stage {stage!r} of {context.run_dir} was "
            f"{'made from' if line else 'started with'}, but not their pixels: "
            + (
                "now a .beton serves them that keeps them as JPEG or shrunk. Write data.backend=torch (arrays: memory) "
                "to continue as before"
                if lossy_now
                else "a .beton served them then that kept them as JPEG or shrunk. Put it back and write "
                "data.backend=ffcv to continue as before"
            )
            + ", or name another --run-dir, or delete that one to start over."
        )
    if differing and line:
        raise PruneError(
            f"{' and '.join(_key(name, context) for name in differing)}: the content is not the one that the stage "
            f"{stage!r} of {context.run_dir} was made from. Name another --run-dir, or delete that one to start over."
        )


def _key(name: str, context: RunContext) -> str:
    """The recipe keys that name a changed input. Other class numbers count as other content."""
    mapped = context.recipe.data.class_map and name in ("train", "eval")
    return KEYS[name] + (" or data.class_map" if mapped else "")


def _images(identity: str) -> str:
    return identity.split(":")[0]


def _read_start(stage: str, context: RunContext) -> dict:
    """The record of ``record_start`` if it is the stage's; else empty."""
    note = read_json(context.path(STARTED))
    outside = note.get("outside")
    well_formed = isinstance(outside, dict) and all(isinstance(value, str) for value in outside.values())
    return note if note.get("stage") == stage and well_formed else {}
