"""A .beton that comes or goes between two commands: the same images go on, other pixels are refused by their cause."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from dist_prune import methods
from dist_prune.cli import main as cli
from dist_prune.config import loading
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.ffcv.backend import sidecar_path
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.fileio import seal, unseal
from dist_prune.pipeline import external_inputs
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.runner import ORDER, fingerprint
from dist_prune.training.tracking import Tracker

TRAIN = next(stage for stage in ORDER if stage.name == "train")


@pytest.fixture(scope="module")
def folder(ffcv, tmp_path_factory) -> Path:
    """An image folder, and beside it (elsewhere) its training images as raw.beton and as jpg.beton."""
    root = tmp_path_factory.mktemp("outside")
    source = open_source("digits", None, "", False)
    assert isinstance(source, ArraySource)
    for split in ("train", "val"):
        for number in range(60):
            place = root / split / str(source.labels[number])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[number].repeat(3, axis=2)).save(place / f"{number:02}.png")
    for mode in ("raw", "jpg"):
        words = ["make-ffcv", "--source", str(root), "--write-mode", mode, "--out", str(root / f"{mode}.beton")]
        assert cli.main(words) == 0
    return root


def work(root: Path, place: Path, *words: str) -> RunContext:
    """A run that starts anew in ``place``, as a second command would."""
    keys = (
        f"data.root={root}",
        "data.source=imagefolder",
        "data.image_size=8",
        "data.mean=null",
        "data.std=null",
        *words,
    )
    recipe = loading.load("quickstart", list(keys), methods.options_of)
    return RunContext(
        recipe, DistributedEnvironment.single_process(), Tracker(False), place, methods.build(recipe.method)
    )


def lay(root: Path, mode: str | None) -> None:
    """Put one of the .beton files where ``auto`` finds it, or none."""
    there = root / "train.beton"
    for file in (there, sidecar_path(there)):
        file.unlink(missing_ok=True)
    if mode:
        shutil.copy(root / f"{mode}.beton", there)
        shutil.copy(sidecar_path(root / f"{mode}.beton"), sidecar_path(there))


def finish(run: RunContext) -> None:
    run.ledger.append(
        {
            "stage": "train",
            "fingerprint": fingerprint(TRAIN, run),
            "outputs": {},
            "outside": external_inputs.digests(run, "train"),
        }
    )


def test_a_beton_of_the_same_pixels_changes_nothing(folder, tmp_path):
    lay(folder, None)
    before = work(folder, tmp_path)
    finish(before)
    assert before.images.description()["backend"] == {"train": "torch", "eval": "torch"}
    lay(folder, "raw")
    after = work(folder, tmp_path)
    assert after.images.description()["backend"] == {"train": "ffcv", "eval": "torch"}
    assert fingerprint(TRAIN, after) == fingerprint(TRAIN, before)


@pytest.mark.parametrize("finished", [True, False])
def test_a_beton_of_other_pixels_is_refused_by_its_cause(folder, tmp_path, finished):
    """A finished stage, and one that was interrupted and would start over; in both directions."""
    then = "made from" if finished else "started with"
    for first, second, said in (
        (None, "jpg", "now a .beton serves them .* Write data.backend=torch"),
        ("jpg", None, "a .beton served them then .* data.backend=ffcv"),
    ):
        place = tmp_path / str(first)
        lay(folder, first)
        run = work(folder, place)
        place.mkdir()
        external_inputs.record_start("train", run, external_inputs.digests(run, "train"))
        if finished:
            finish(run)
        lay(folder, second)
        with pytest.raises(PruneError, match=f"data.backend: the training images .* {then}, .* {said}"):
            fingerprint(TRAIN, work(folder, place))
    lay(folder, "jpg")
    assert fingerprint(TRAIN, work(folder, tmp_path / "None", "data.backend=torch")), "what the message says helps"


def test_a_stage_that_was_only_begun_may_start_over_with_other_images(folder, tmp_path):
    lay(folder, None)
    run = work(folder, tmp_path)
    external_inputs.record_start("train", run, external_inputs.digests(run, "train") | {"train": "others"})
    assert fingerprint(TRAIN, run)
    (tmp_path / external_inputs.STARTED).write_text("{")
    assert fingerprint(TRAIN, run)
    external_inputs.record_start("train", run, external_inputs.digests(run, "train") | {"train": "others"})
    finish(run)
    line = unseal(run.ledger.file.read_text())
    assert line is not None
    line["outside"]["train"] = "others"
    run.ledger.file.write_text(seal(line) + "\n")
    with pytest.raises(PruneError, match=r"data\.root \(training images\): the content is not the one"):
        fingerprint(TRAIN, run)
