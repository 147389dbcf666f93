"""What ``dist-prune check`` passes is what a run starts with: the same sentences, before any work."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune import methods, models
from dist_prune.cli.check import plan_on_random_scores, trace_backbone
from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.data.split_checks import check_same_names
from dist_prune.errors import PruneError
from dist_prune.pipeline import recipe_checks
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.run import main as run
from tests.data.test_tar_shards import jpeg, write_tar
from tests.support.launch import SMALL


def refused(capsys, *words: str) -> str:
    assert main(["check", "quickstart", "backbone.name=resnet8p_cifar", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("backbone.checkpoint=/no/such.safetensors", "backbone.checkpoint: there is no file /no/such.safetensors"),
        ("score.from=/no/run", "score.from: /no/run has no finished scores"),
        ("select.plan=/no/plan.json", "select.plan: there is no plan file /no/plan.json"),
        ("train.epochs=0", "there is no dense network: set backbone.checkpoint=FILE"),
    ],
)
def test_check_and_a_run_refuse_alike(override, said, capsys, tmp_path):
    plan = ["target.macs=null"] if "plan" in override else []
    text = refused(capsys, override, *plan)
    assert said in text
    assert "dist-prune check --assume" in text
    folder = tmp_path / "run"
    words = ["--recipe", "quickstart", "--run-dir", str(folder), "backbone.name=resnet8p_cifar", override, *plan]
    assert run(words) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "dense.safetensors").exists(), "nothing was trained before it was said"
    assert main(["check", "quickstart", "--assume", "backbone.name=resnet8p_cifar", override, *plan]) == 0
    assert f"assumed to be there where it runs: {said}" in capsys.readouterr().out


def test_missing_images(capsys, tmp_path):
    images = [
        "data.source=imagefolder",
        f"data.root={tmp_path / 'images'}",
        "data.image_size=32",
        "data.mean=",
        "data.std=",
    ]
    assert f"there is no {tmp_path / 'images'}. imagefolder: ROOT/train/<class>" in refused(capsys, *images)
    (tmp_path / "images/train/a").mkdir(parents=True)
    assert f"there is no folder {tmp_path / 'images/val'}" in refused(capsys, *images)
    (tmp_path / "images/val").mkdir()
    assert "has no folders; there is one for each class" in refused(capsys, *images)
    for split, name in itertools.product(("train", "val"), "ab"):
        place = tmp_path / "images" / split / name
        place.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / "0.png")
    assert main(["check", "quickstart", "backbone.name=resnet8p_cifar", *images]) == 0
    capsys.readouterr()
    arrays = ["data.source=npz", f"data.root={tmp_path / 'x.npz'}", "data.mean=", "data.std="]
    assert f"there is no {tmp_path / 'x.npz'}. npz: one file with x_train" in refused(capsys, *arrays)
    assert main(["check", "--assume", "quickstart", "--json", *arrays]) == 0
    assert json.loads(capsys.readouterr().out)["not_here"][0].startswith("data.root: there is no")
    rng = np.random.default_rng(0)
    parts = {f"x_{p}": rng.integers(0, 255, (20, 32, 32, 3), np.uint8) for p in ("train", "test")}
    np.savez(tmp_path / "x.npz", **parts, y_train=np.arange(20) % 2, y_test=np.arange(20) % 2)
    assert main(["check", "quickstart", "backbone.name=resnet8p_cifar", *arrays]) == 0
    assert "no cifar10 below" in refused(capsys, "data.source=cifar10", f"data.root={tmp_path}")


def test_an_unset_variable_says_what_has_to_lie_there(capsys, monkeypatch):
    monkeypatch.delenv("DIST_PRUNE_DATA", raising=False)
    assert main(["check", "resnet50_graph"]) == 2
    text = capsys.readouterr().err
    for words in (
        "DIST_PRUNE_DATA is not set", "${DIST_PRUNE_DATA}/imagenet/train/<class>/<image>",
        "${DIST_PRUNE_DATA}/imagenet/val/<class>/<image>", "write data.root=FOLDER for an existing folder",
        "dist-prune check --assume",
    ):  # fmt: skip
        assert words in text
    assert main(["check", "resnet56_cifar10_graph"]) == 2
    assert "${DIST_PRUNE_DATA}/cifar10.npz, the .npz file (x_train" in capsys.readouterr().err
    assert main(["check", "resnet56_cifar10_graph", "--assume"]) == 0


def test_contradictions_that_a_run_would_refuse(capsys):
    text = refused(capsys, "schedule.carry_optimizer=true", "finetune.optimizer=agdam")
    assert "schedule.carry_optimizer: with schedule.rounds 1" in text
    assert "finetune.optimizer: unknown optimizer 'agdam'" in text
    assert "--assume" not in text, "no other machine mends that"


def test_what_is_done_needs_no_file_any_more():
    spec = loading.load("quickstart", ["backbone.checkpoint=/no/x", "score.from=/no/run"], methods.options_of)
    assert len(recipe_checks.missing_files(spec)) == 2
    assert recipe_checks.missing_files(spec, ("train", "score")) == []


def test_the_checkpoint_is_read(capsys, tmp_path):
    """Another network's, another class count's, one that would run code: the sentence of a run, before it."""
    here = ["backbone.name=resnet8p_cifar", "train.epochs=0", f"backbone.checkpoint={tmp_path / 'x.pt'}"]
    for classes, name, said in ((10, "resnet14p_cifar", "does not fit"), (7, "resnet8p_cifar", "class count mismatch")):
        model = models.create(name, classes, 1, kwargs={"img_size": 8})
        torch.save(model.state_dict(), tmp_path / "x.pt")
        assert said in refused(capsys, *here)
    torch.save({"state_dict": tmp_path.joinpath}, tmp_path / "x.pt")
    assert "would run code" in refused(capsys, *here)
    torch.save(models.create("resnet8p_cifar", 10, 1, kwargs={"img_size": 8}).state_dict(), tmp_path / "x.pt")
    assert main(["check", "quickstart", *here]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("deit_base_isomorphic", {0.2457: 4.16e9, 0.1542: 2.61e9, 0.0715: 1.21e9, 0.0366: 0.62e9}),
        ("convnext_tiny_isomorphic", {0.2729: 4.19e9, 0.5523: 8.48e9}),
    ],
)
def test_isomorphic_recipes_reach_the_paper_s_sizes(recipe, sizes):
    """Within 1 % on the real architecture, without data: with scores drawn from the seed."""
    spec = loading.load(recipe, [], methods.options_of, need_environment=False)
    method = methods.build(spec.method)
    graph, _, _ = trace_backbone(spec, method)
    assert [group.name for group in graph.groups if group.protected] in (["head"], ["head.fc"])
    for share, macs in sizes.items():
        left = plan_on_random_scores(graph, replace(SelectionRequest.of(spec), target=("macs", share)), method)
        assert left["macs"] == pytest.approx(macs, rel=0.01)


def test_check_says_that_a_run_would_miss_its_target(capsys, tmp_path):
    """Rounding is too coarse: the run ends with code 3, and with the target that check suggests it does not."""
    words = [*SMALL, "train.epochs=1", "finetune.epochs=0", "method.name=l1", "select.round_to=16"]
    missed = [*words, "target.macs=0.5", "target.tolerance=0.01"]
    assert main(["check", "quickstart", *missed]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("warning: target.macs: 0.5 is asked for"))
    assert "a run would end with exit code 3" in line and "steps of 16 (select.round_to)" in line
    below, above = (float(share) for share in re.findall(r"([\d.]+)% and ([\d.]+)%", line)[0])
    assert below < 50 < above
    assert run(["--recipe", "quickstart", "--run-dir", str(tmp_path / "missed"), *missed]) == 3
    capsys.readouterr()
    advice = re.findall(r"write (target\.\w+=[\d.]+)", line)
    for number, key in enumerate(advice):
        assert main(["check", "quickstart", "--json", *missed, key]) == 0
        assert "missed" not in json.loads(capsys.readouterr().out)
        assert run(["--recipe", "quickstart", "--run-dir", str(tmp_path / str(number)), *missed, key]) == 0
        capsys.readouterr()
    assert len(advice) == 2
    assert main(["check", "quickstart", *missed, "target.tolerance=null"]) == 0
    assert "exit code 3" not in capsys.readouterr().out, "any miss is accepted"


def test_check_says_what_a_target_leaves(capsys):
    words = ["check", "quickstart", "--assume", "backbone.name=resnet8p_cifar", "method.name=l1", "target.macs=0.5"]
    assert main(words) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("with random scores"))
    share = float(line.split("macs (")[1].split("%")[0])
    assert 40 < share <= 50


def shards(tmp_path, train: dict[str, bytes], val: dict[str, bytes]) -> list[str]:
    write_tar(tmp_path / "train-0.tar", train)
    write_tar(tmp_path / "val-0.tar", val)
    return ["data.source=tar", f"data.root={tmp_path}", "data.image_size=32", "data.mean=", "data.std="]


def numbered(labels: list[int], first: int) -> dict[str, bytes]:
    members = {}
    for i, label in enumerate(labels, first):
        members |= {f"{i}.jpg": jpeg(i), f"{i}.cls": str(label).encode()}
    return members


def test_classes_of_shards_are_compared_as_a_run_compares_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = shards(tmp_path, {"ant/1.jpg": jpeg(1), "bee/2.jpg": jpeg(2)}, {"ant/3.jpg": jpeg(3), "cat/4.jpg": jpeg(4)})
    said = "missing in evaluation: ['bee'], only there: ['cat']. Both splits need the same classes"
    assert said in refused(capsys, *words)
    folder = tmp_path / "run"
    assert run(["--recipe", "quickstart", "--run-dir", str(folder), "backbone.name=resnet8p_cifar", *words]) == 2
    assert said in capsys.readouterr().err
    words = shards(tmp_path, numbered([0, 0, 0], 1), numbered([0, 0], 9))
    assert "all of them are of one class" in refused(capsys, *words)
    words = shards(tmp_path, numbered([0, 1, 2], 1), numbered([0, 1], 9))
    assert "the evaluation images have 2 classes, the training images 3" in refused(capsys, *words)


def test_class_numbers_that_start_at_1_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = shards(tmp_path, numbered([1, 2, 3], 1), numbered([1, 2, 3], 9))
    assert main(["check", "quickstart", "backbone.name=resnet8p_cifar", *words]) == 0
    said = "WARNING: the labels run from 1 to 3, so no image has class 0, and the network gets 4 outputs"
    assert said in capsys.readouterr().out
    words = shards(tmp_path, numbered([1, 2, 3], 1), numbered([0, 2, 3], 9))
    assert main(["check", "quickstart", "backbone.name=resnet8p_cifar", *words]) == 0
    assert "so no image has class 0" not in capsys.readouterr().out


def test_orders_of_the_same_classes():
    with pytest.raises(PruneError, match="number 1 is 'bee' in the training images and 'cat' in the evaluation images"):
        check_same_names(["ant", "bee", "cat"], ["ant", "cat", "bee"])


def test_a_folder_to_copy_to_that_cannot_be_made(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / split / name / "1.png")
    (tmp_path / "file").write_text("")
    words = ["data.source=imagefolder", f"data.root={tmp_path}", "data.image_size=32", "data.mean=", "data.std="]
    place = tmp_path / "file" / "copies"
    said = (
        f"data.stage_to: {place} cannot be made: {tmp_path / 'file'} is no folder. Name a folder of the node's own disk"
    )
    assert said in refused(capsys, *words, f"data.stage_to={place}")
    if Path("/proc").is_dir():
        assert "data.stage_to: /proc/copies cannot be made in /proc: " in refused(
            capsys, *words, "data.stage_to=/proc/copies"
        )
    assert (
        main(["check", "quickstart", "backbone.name=resnet8p_cifar", *words, f"data.stage_to={tmp_path / 'new'}"]) == 0
    )
    assert not (tmp_path / "new").exists()
