"""Whole runs that detect: killed and resumed to the same bits, the same results on two ranks, pictures, refusals."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from dist_prune import models
from dist_prune.cli.main import main
from dist_prune.distributed import tensor_files
from dist_prune.export import bundle
from dist_prune.run import main as run_here
from tests.support import boxes
from tests.support.launch import PYTHON, TORCHRUN, environment, report, run, start, wait_for

pytestmark = pytest.mark.slow
WORDS = (
    "backbone.kwargs={width_mult: 0.25}", "data.image_size=64", "data.eval_split=val", "data.workers=0",
    "train.epochs=0", "train.warmup_epochs=0", "finetune.batch=8", "finetune.epochs=2", "finetune.save_every_steps=1",
    "score.images=all", "score.micro_batch=4", "score.save_every=2", "evaluate.batch=5", "report.latency_batches=[1]",
    "report.latency_repeats=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    boxes.write(folder / "camvid", count=27)
    torch.manual_seed(0)
    model = models.create(f"torchvision:{boxes.SSD}", 2, 3, kwargs={"width_mult": 0.25})
    tensor_files.save_tensors(folder / "dense.safetensors", model.state_dict())
    return folder


def words(place) -> dict[str, str]:
    return {"recipe": "ssdlite_camvid_taylor", "DIST_PRUNE_DATA": str(place), "XDG_CACHE_HOME": str(place / "cache")}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, output = run(PYTHON, folder, *WORDS, f"backbone.checkpoint={place}/dense.safetensors", **words(place))
    assert code == 0, output
    return folder, output


def test_the_report_has_the_task_its_figures_and_pictures(whole):
    folder, output = whole
    body = report(folder)
    assert body["task"]["name"] == "detection"
    assert "mAP@[.5:.95] %" in output
    assert "boxes of 2 classes in the training images" in output
    assert body["achieved"]["macs"] <= 0.51
    assert {"map", "ap50", "loss"} <= body["finetuned"].keys()
    page = (folder / "report.html").read_text()
    assert page.count("<figcaption>finetuned</figcaption>") == 3
    assert page.count("<figcaption>boxes</figcaption>") == 3


def test_the_bundle_loads_as_a_detector(whole):
    folder, _ = whole
    read = bundle.read_bundle(folder)
    assert read.body["task"]["primary"] == "map"
    anchors = 6 * (4 * 4 + 2 * 2 + 4)  # maps of 4x4 and 2x2, and four of one position
    assert read.body["outputs"] == {"logits": [3, anchors], "box_regression": [anchors, 4], "anchors": [anchors, 4]}
    network = bundle.load(folder)
    (found,) = network([torch.rand(3, boxes.HEIGHT, boxes.WIDTH)])
    assert set(found) == {"boxes", "scores", "labels"}
    limits = torch.tensor([boxes.WIDTH, boxes.HEIGHT] * 2)
    assert bool((found["boxes"] <= limits).all())
    assert network.transform.image_mean == [0.4134, 0.4265, 0.4340]


def test_files_of_a_single_stage_are_written_and_answer_alike(whole, place):
    command = [sys.executable, "-m", "dist_prune.cli", "export", str(whole[0]), "--count", "5", "--json"]
    where = {key: value for key, value in words(place).items() if key != "recipe"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**where))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    names = ["logits", "box_regression", "anchors"]
    assert {kind: facts[kind]["outputs"] for kind in facts} == {"onnx": names, "pt2": names}
    assert all(facts[kind]["difference"] < 1e-4 for kind in facts)


def test_two_ranks_cut_the_same_channels_and_measure_the_same(whole, place, tmp_path):
    code, output = run(
        TORCHRUN, tmp_path / "two", *WORDS, f"backbone.checkpoint={place}/dense.safetensors", **words(place)
    )
    assert code == 0, output
    one, two = report(whole[0]), report(tmp_path / "two")
    assert one["plan"]["fingerprint"] == two["plan"]["fingerprint"]
    for network in ("dense", "pruned"):
        for key in ("map", "ap50", "loss"):
            assert one[network][key] == two[network][key]


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


TWO_STAGES = (
    f"backbone.name=torchvision:{boxes.RCNN}",
    "backbone.kwargs={box_batch_size_per_image: 8, rpn_batch_size_per_image: 16, rpn_post_nms_top_n_test: 6, "
    "rpn_pre_nms_top_n_train: 60, rpn_post_nms_top_n_train: 30}",
    "train.epochs=1", "train.batch=9", "train.evaluate_every=1", "finetune.epochs=1",
)  # fmt: skip


def test_two_stages_run_through_and_are_not_written_as_files(place, tmp_path):
    folder = tmp_path / "run"
    code, output = run(PYTHON, folder, *WORDS, *TWO_STAGES, **words(place))
    assert code == 0, output
    body = report(folder)
    assert body["achieved"]["macs"] <= 0.51
    kept = {group["name"]: group["kept"] / group["width"] for group in body["plan"]["groups"]}
    assert min(kept[name] for name in kept if name.startswith("backbone.fpn")) < 1
    assert len(bundle.load(folder)([torch.rand(3, 40, 50)])) == 1
    assert main(["export", str(folder), "--format", "onnx"]) == 2


def test_a_latency_target_finds_a_network(place, tmp_path):
    code, output = run(
        PYTHON, tmp_path / "run", *WORDS, f"backbone.checkpoint={place}/dense.safetensors", "target.macs=",
        "target.latency=0.9", "target.latency_tolerance=", "finetune.epochs=0", "method.name=l1", **words(place),
    )  # fmt: skip
    assert code == 0, output
    assert "latency" in report(tmp_path / "run")["target"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["method.name=hrel"], "method.name: hrel needs one class number for each image; the task detection has none"),
        (["finetune.distill=0.5"], "finetune.distill: the task detection has no distillation loss"),
        (["task.name=segmentation"], "segmentation learns from a mask for each image"),
        (["backbone.name=resnet18", "backbone.kwargs="], "detection needs a detector: torchvision:ssdlite320"),
        (["data.eval_split=tset"], "there is no folder"),
        (["task.min_scor=1"], "task.min_scor: unknown key. Did you mean 'min_score'?"),
    ],
)
def test_check_and_a_run_refuse_alike(place, more, text, capsys, tmp_path, monkeypatch):
    for key in ("DIST_PRUNE_DATA", "XDG_CACHE_HOME"):
        monkeypatch.setenv(key, words(place)[key])
    given = [*WORDS, f"backbone.checkpoint={place}/dense.safetensors", *more]
    assert main(["check", "ssdlite_camvid_taylor", *given]) == 2
    assert text in capsys.readouterr().err
    assert run_here(["--recipe", "ssdlite_camvid_taylor", "--run-dir", str(tmp_path / "run"), *given]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run" / "dense.safetensors").exists()
