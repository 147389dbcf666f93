"""Whole runs that segment: killed and resumed to the same bits, the same plan on several ranks, pictures, files."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.export import bundle
from tests.support import masks
from tests.support.launch import PYTHON, TORCHRUN, environment, report, run, start, wait_for

pytestmark = pytest.mark.slow
NETWORK = {"encoder": "mobilenetv3_small_050", "width": 4}
WORDS = (
    "backbone.kwargs={encoder: mobilenetv3_small_050, width: 4}", "data.image_size=32", "data.eval_split=val",
    "data.workers=0", "train.epochs=0", "train.warmup_epochs=0", "finetune.batch=8", "finetune.epochs=3",
    "finetune.save_every_steps=1", "score.images=all", "score.micro_batch=2", "score.save_every=2", "evaluate.batch=5",
    "report.latency_batches=[1]", "report.latency_repeats=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    masks.write(folder / "camvid", count=43)
    torch.manual_seed(0)
    model = models.create("unet", masks.CLASSES, 3, kwargs=NETWORK)
    tensor_files.save_tensors(folder / "dense.safetensors", model.state_dict())
    return folder


def words(place) -> dict[str, str]:
    return {"recipe": "unet_camvid_taylor", "DIST_PRUNE_DATA": str(place), "XDG_CACHE_HOME": str(place / "cache")}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, output = run(PYTHON, folder, *WORDS, f"backbone.checkpoint={place}/dense.safetensors", **words(place))
    assert code == 0, output
    return folder, output


def test_the_report_has_the_task_its_figures_and_pictures(whole):
    folder, output = whole
    body = report(folder)
    assert body["task"]["name"] == "segmentation"
    assert "mIoU %" in output
    assert "top-1" not in output
    assert body["achieved"]["macs"] <= 0.51
    assert {"miou", "pixel_accuracy", "loss"} <= body["finetuned"].keys()
    page = (folder / "report.html").read_text()
    assert page.count("<figcaption>finetuned</figcaption>") == 3
    assert "top-1" not in page.partition("<h2>Recipe</h2>")[0]


def test_pictures_show_the_repaired_network_too(whole, place, tmp_path):
    words_of_repair = ("repair.method=least_squares", "repair.images=8", "finetune.epochs=0", "score.images=8")
    folder, checkpoint = tmp_path / "repaired", f"backbone.checkpoint={place}/dense.safetensors"
    code, output = run(PYTHON, folder, *WORDS, *words_of_repair, checkpoint, **words(place))
    assert code == 0, output
    page = (folder / "report.html").read_text()
    for name in ("dense", "pruned", "repaired", "finetuned"):
        assert page.count(f"<figcaption>{name}</figcaption>") == 3
    assert "<figcaption>repaired</figcaption>" not in (whole[0] / "report.html").read_text()


def test_the_bundle_says_what_it_holds_and_loads(whole):
    folder, _ = whole
    read = bundle.read_bundle(folder)
    assert read.body["task"]["titles"]["miou"] == "mIoU %"
    assert read.body["outputs"] == {"logits": [masks.CLASSES, 32, 32]}
    assert bundle.load(folder)(torch.zeros(2, 3, 32, 32)).shape == (2, masks.CLASSES, 32, 32)


def test_files_are_written_and_answer_alike(whole, place):
    command = [sys.executable, "-m", "dist_prune.cli", "export", str(whole[0]), "--count", "5", "--json"]
    where = {key: value for key, value in words(place).items() if key != "recipe"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**where))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {kind: facts[kind]["outputs"] for kind in facts} == {"onnx": ["logits"], "pt2": ["logits"]}
    assert all(facts[kind]["difference"] < 1e-4 for kind in facts)


def test_two_ranks_cut_the_same_channels(whole, place, tmp_path):
    code, output = run(
        TORCHRUN, tmp_path / "two", *WORDS, f"backbone.checkpoint={place}/dense.safetensors", **words(place)
    )
    assert code == 0, output
    one, two = report(whole[0]), report(tmp_path / "two")
    assert one["plan"]["fingerprint"] == two["plan"]["fingerprint"]
    for key in ("miou", "pixel_accuracy", "loss"):
        assert one["pruned"][key] == two["pruned"][key]


def test_killed_in_scoring_and_in_training_it_ends_at_the_same_bits(whole, place, tmp_path):
    folder = tmp_path / "cut"
    arguments = (*WORDS, f"backbone.checkpoint={place}/dense.safetensors")
    for file in ("round_1/partial/observation_1.safetensors", "finetune_checkpoints/*.sha256"):
        process = start(PYTHON, folder, *arguments, **words(place))
        wait_for(process, lambda file=file: any(folder.glob(file)))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    code, output = run(PYTHON, folder, *arguments, **words(place))
    assert code == 0, output
    assert "resumes after" in output
    for file in ("round_1/pruned.safetensors", "finetuned.safetensors"):
        one, two = (tensor_files.read_tensors(run_dir / file)[0] for run_dir in (whole[0], folder))
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name].numpy(), two[name].numpy()) for name in one), file
