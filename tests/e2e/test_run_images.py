"""Whole runs on image files: what cannot be read is left out on every rank and listed, what served them is reported."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from dist_prune import methods
from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.precheck import precheck
from dist_prune.stages import score
from dist_prune.training.tracking import Tracker
from tests.support import tiny
from tests.support.launch import PYTHON, SMALL, TORCHRUN, report, run, start, wait_for

WORDS = (
    *SMALL, "data.source=imagefolder", "data.image_size=8", "data.crop=1.0", "data.mean=[0.3,0.3,0.3]",
    "data.std=[0.4,0.4,0.4]", "data.workers=1", "train.epochs=1", "finetune.epochs=2",
    "score.images=60", "train.batch=32", "finetune.batch=32",
)  # fmt: skip


@pytest.fixture
def digits(tmp_path):
    """200 + 100 digits as PNG files; the first of each of three training classes and one test image are damaged."""
    for split, train, count in (("train", True, 200), ("val", False, 100)):
        source = open_source("digits", None, "", train)
        assert isinstance(source, ArraySource)
        for number in range(count):
            place = tmp_path / split / str(source.labels[number])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[number].repeat(3, axis=2)).save(place / f"{number:03}.png")
    damaged = [next(iter(sorted((tmp_path / "train" / name).iterdir()))) for name in "147"]
    damaged.append(next(iter(sorted((tmp_path / "val" / "2").iterdir()))))
    for file in damaged:
        file.write_bytes(file.read_bytes()[:60])
    return tmp_path, damaged


SKIPPING = (
    "score.images=all", "data.on_error=skip", "data.resize_schedule={0: 8, 1: 12}", "data.auto_augment=rand-m5",
    "data.random_erasing=0.2", "data.augment=resized_crop_flip",
)  # fmt: skip


@pytest.fixture
def skipped(digits, tmp_path):
    """A run on two ranks that leaves the damaged images out."""
    code, output = run(TORCHRUN, tmp_path / "two", *WORDS, *SKIPPING, f"data.root={digits[0]}")
    assert code == 0, output
    return tmp_path / "two", output, report(tmp_path / "two")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_take_the_loader_workers_first(digits, tmp_path, number):
    """Schedulers signal every process of a job step: the workers go on serving until the run has saved."""
    words = (*WORDS, "data.on_error=skip", f"data.root={digits[0]}", "train.epochs=500", "train.save_every_steps=3")
    process = start(("setsid", *PYTHON), tmp_path / "run", *words)
    wait_for(process, (tmp_path / "run/train_checkpoints").exists)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert f"stopped by {signal.Signals(number).name} in " in output
    assert "is killed by signal" not in output


@pytest.mark.slow
def test_unreadable_images_are_left_out_of_a_run_and_listed(digits, skipped):
    (root, damaged), (folder, output, body) = digits, skipped
    assert "training images come through the torch backend (there is no" in output
    assert "3 of 200 images cannot be read and are left out" in output
    found = {stage: [item["file"] for item in items] for stage, items in body["skipped_images"].items()}
    assert found["score"] == [str(file) for file in damaged[:3]]
    assert found["finetune"] == [str(file) for file in damaged[:3]], "each once, in two epochs on two ranks"
    assert found["evaluate"] == [str(damaged[3])]
    assert body["dense"]["images"] == body["finetuned"]["images"] == 99
    source = open_source("imagefolder", str(root), "train", True)
    scores, _ = tensor_files.read_tensors(folder / "round_1/scores.safetensors")
    ids = scores["calibration_ids"].tolist()
    assert len(ids) == 197
    assert not {source.paths[sample] for sample in ids} & set(damaged)  # type: ignore[union-attr]
    assert body["images"]["backend"] == {"train": "torch", "eval": "torch"}
    assert body["images"]["eval_transform"] == {
        "size": 8, "mean": [0.3] * 3, "std": [0.4] * 3, "crop": 1.0, "crop_mode": "center",
        "interpolation": "bilinear", "exif": True, "decoder": "pillow", "dct_scaled": False, "resizer": "pillow",
    }  # fmt: skip
    assert body["images"]["training"]["schedule"] == [[0, 8], [1, 12]]
    assert "3 training image(s) could not be read" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_one_rank_leaves_out_the_same_images(digits, skipped, tmp_path):
    dense = (f"backbone.checkpoint={skipped[0] / 'dense.safetensors'}", "train.epochs=0")
    words = (*WORDS, *SKIPPING, f"data.root={digits[0]}", *dense)
    code, output = run(PYTHON, tmp_path / "one", *words)
    assert code == 0, output
    body = report(tmp_path / "one")
    assert body["plan"]["fingerprint"] == skipped[2]["plan"]["fingerprint"]
    for stage in ("score", "finetune", "evaluate"):
        assert body["skipped_images"][stage] == skipped[2]["skipped_images"][stage]


def test_an_unreadable_image_ends_a_run_by_default(digits, tmp_path):
    root, damaged = digits
    code, output = run(TORCHRUN, tmp_path / "run", *WORDS, f"data.root={root}")
    assert code != 0
    assert "cannot be decoded" in output
    assert any(str(file) in output for file in damaged)
    assert 'Traceback (most recent call last):\n  File "/' not in output.split("cannot be decoded")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.backend=memory",), "data.backend: 'memory' is for arrays"),
        (("data.auto_augment=rand-x",), "timm's 'rand' knows no x"),
        (("data.resize_schedule={1: 8}",), "data.resize_schedule must begin at epoch 0"),
        (("data.crop_scale=[0.5,0.1]",), "the first number must not be larger than the second"),
        (("data.resize_schedule={0: 20}", "backbone.name=vit_tiny_patch16_224"), "cannot take images of side 20"),
    ],
)
def test_data_keys_that_cannot_be_met(digits, tmp_path, words, said):
    with pytest.raises(PruneError, match=re.escape(said)):
        precheck(work_of(tmp_path, f"data.root={digits[0]}", *words))


def work_of(folder: Path, *words: str) -> RunContext:
    spec = loading.load("quickstart", [*WORDS, *words], methods.options_of)
    method = methods.find(spec.method["name"])
    return RunContext(spec, tiny.machine(), Tracker(False), folder, method(method.Options()))


def test_calibration_images_are_balanced_when_asked(digits, tmp_path):
    """The same number of each class, from the training images, written down with the scores."""
    context = work_of(
        tmp_path, "score.balance=class", "data.source=digits", "data.mean=null", "data.std=null", "data.crop=null"
    )
    tensor_files.save_tensors(tmp_path / "dense.safetensors", context.networks.create_initial().state_dict())
    made = score.run(context)
    ids = made.tensors["round_1/scores.safetensors"][0]["calibration_ids"].numpy()
    assert np.bincount(open_source("digits", None, "", True).labels[ids]).tolist() == [6] * 10


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_no_loader_worker_outlives_its_run(digits, tmp_path, number):
    """Killed in the middle of an epoch, or asked to stop: soon after the run has ended its workers have, too."""
    words = (*WORDS, "data.on_error=skip", f"data.root={digits[0]}", "train.epochs=500", "data.workers=2")
    process = start(PYTHON, tmp_path / "run", *words)
    wait_for(process, (tmp_path / "run/train_checkpoints").exists)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]
    assert len(workers) >= 2, "the loader's processes"
    process.send_signal(number)
    process.wait(90)  # not communicate: the workers hold the pipe open as long as they live
    left = time.monotonic() + 2
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < left, "a worker is still at work 2 s later"
        time.sleep(0.05)
    process.communicate(timeout=90)


@pytest.mark.slow
def test_one_plan_from_a_folder_tar_shards_and_memory(tmp_path):
    """The same images under the same ids: weights, scores and plans do not know what they were read from."""
    arrays = {}
    for split, train, count in (("train", True, 200), ("val", False, 100)):
        source = open_source("digits", None, "", train)
        assert isinstance(source, ArraySource)
        order = np.argsort(source.labels[:count], kind="stable")
        images = source.images[:count][order].repeat(3, axis=3)
        suffix = "train" if train else "test"
        arrays |= {f"x_{suffix}": images, f"y_{suffix}": source.labels[:count][order]}
        for number, (image, label) in enumerate(zip(images, source.labels[:count][order], strict=True)):
            file = tmp_path / "folder" / split / str(label) / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        argument = "train" if train else "eval"
        packed = ("--split", argument, "--out", str(tmp_path / "tar"), "--name", "digits")
        assert main(["pack", "--source", str(tmp_path / "folder"), *packed]) == 0
    np.savez(tmp_path / "digits.npz", **arrays)
    plain = (*WORDS, "data.on_error=fail", "finetune.epochs=0", "data.augment=none")
    files = ("data.source=imagefolder", f"data.root={tmp_path / 'folder'}")
    shards = ("data.source=tar", f"data.root={tmp_path / 'tar'}/digits-{{split}}-*.tar")
    array = tuple(word for word in plain if not word.startswith(("data.source", "data.crop")))
    npz = (*array, "data.source=npz", f"data.root={tmp_path / 'digits.npz'}")
    runs = (
        (PYTHON, "folder", (*plain, *files)), (PYTHON, "shards", (*plain, *shards)),
        (TORCHRUN, "two", (*plain, *shards)), (PYTHON, "memory", npz),
    )  # fmt: skip
    plans = {}
    for launcher, name, words in runs:
        trained = tmp_path / "run_folder" / "dense.safetensors"
        dense = ("train.epochs=0", f"backbone.checkpoint={trained}") if trained.exists() else ()
        code, output = run(launcher, tmp_path / f"run_{name}", *words, *dense)
        assert code == 0, output
        plans[name] = report(tmp_path / f"run_{name}")["plan"]
    found = {name: plan["fingerprint"] for name, plan in plans.items()}
    assert len(set(found.values())) == 1, found
