"""``dist-prune new``, ``prune`` and ``finetune`` on real images, as a person types them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune import methods
from dist_prune.cli.found_images import find_layout, look, unlabelled
from dist_prune.cli.main import main
from dist_prune.cli.network_labels import class_names
from dist_prune.cli.new import choose_batch, choose_epochs
from dist_prune.config import loading
from dist_prune.config.data import Backbone
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.export import bundle
from tests.data.test_tar_shards import webdataset
from tests.support import tiny
from tests.support.launch import ROOT, environment

RNG = np.random.default_rng(0)
QUICK = (
    "data.workers=0", "data.image_size=8", "data.crop=1.0", "score.images=20", "score.micro_batch=10",
    "report.latency_repeats=1", "report.latency_batches=[1]", "target.tolerance=1",
)  # fmt: skip


def fill(folder: Path, classes: int = 3, count: int = 12, side: int = 8) -> Path:
    for number in range(classes):
        for copy in range(count):
            place = folder / f"class_{number}" / f"{copy}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = RNG.integers(40 * number, 40 * number + 80, (side, side + copy % 3, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        fill(root / split)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    torch.manual_seed(0)
    from dist_prune import models

    model = models.create("resnet8p_cifar", 3, 3, kwargs={"img_size": 8})
    tensor_files.save_tensors(file, model.state_dict())
    return file


def test_layouts(images, tmp_path):
    assert find_layout(images) == (
        {"source": "imagefolder", "root": str(images), "train_split": "train", "eval_split": "val"}, False,
    )  # fmt: skip
    one, same = find_layout(images / "val")
    assert same
    assert (one["root"], one["train_split"], one["eval_split"]) == (str(images), "val", "val")
    found = look(images)
    assert (found.classes, found.counts) == (("class_0", "class_1", "class_2"), {"train": 36, "eval": 36})
    assert (found.sides, found.smallest) == ((8, 8, 8), 12)
    with pytest.raises(PruneError, match="there is no folder"):
        find_layout(tmp_path / "none")
    with pytest.raises(PruneError, match="holds no image"):
        find_layout(tmp_path)
    fill(tmp_path / "one", classes=1)
    with pytest.raises(PruneError, match="has one class folder, 'class_0'"):
        find_layout(tmp_path / "one")
    with pytest.raises(PruneError, match="12 images and no class folders"):
        find_layout(tmp_path / "one" / "class_0")


def test_layouts_of_shards_and_lists(images, tmp_path):
    webdataset(tmp_path / "tar", "train")
    webdataset(tmp_path / "tar", "validation", first=20)
    splits = {"train_split": "train", "eval_split": "val"}
    assert find_layout(tmp_path / "tar") == ({"source": "tar", "root": str(tmp_path / "tar"), **splits}, False)
    found = look(tmp_path / "tar")
    assert (found.classes, found.counts) == (("0", "1", "2"), {"train": 12, "eval": 12})
    for split in ("train", "test"):  # a folder for each split
        webdataset(tmp_path / "each" / split, "part")
    assert find_layout(tmp_path / "each")[0]["eval_split"] == "test"
    webdataset(tmp_path / "unnamed", "part")
    with pytest.raises(PruneError, match="holds 2 tar files .* and no name says which split"):
        find_layout(tmp_path / "unnamed")
    files = sorted((images / "train").rglob("*.png"))
    listed = tmp_path / "listed"
    (listed / "images").mkdir(parents=True)
    for name, chosen in (("train", files[::2]), ("test", files[1::2])):
        for file in chosen:
            (listed / "images" / f"{file.parent.name}_{file.name}").write_bytes(file.read_bytes())
        rows = "".join(f"{file.parent.name}_{file.name},{file.parent.name}\n" for file in chosen)
        (listed / f"{name}.csv").write_text("filename,label\n" + rows)
    assert find_layout(listed)[0] == {"source": "imagefolder", "root": str(listed), **splits, "eval_split": "test"}
    assert look(listed).counts == {"train": 18, "eval": 18}


def test_new_takes_no_masks_or_boxes_for_classes_and_compares_the_splits(images, tmp_path):
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "masks" / split / kind).mkdir(parents=True)
            (tmp_path / "masks" / split / kind / "1.png").write_bytes(b"")
    with pytest.raises(PruneError, match=f"no classes.* data.source=maskfolder data.root={tmp_path / 'masks'}"):
        find_layout(tmp_path / "masks")
    (tmp_path / "boxes" / "train" / "images").mkdir(parents=True)
    (tmp_path / "boxes" / "boxes.json").write_text("{}")
    with pytest.raises(PruneError, match="holds images with boxes"):
        find_layout(tmp_path / "boxes")
    other = Path(shutil.copytree(images, tmp_path / "other"))
    (other / "val" / "class_2").rename(other / "val" / "class_9")
    with pytest.raises(PruneError, match=r"missing in evaluation: \['class_2'\], only there: \['class_9'\]"):
        look(other)


def test_new_writes_a_recipe_that_passes_check(images, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    words = ["new", "--data", str(images), "--backbone", "resnet8p_cifar", "--target", "params=0.6", "-o", str(out)]
    assert main(words) == 0
    text = out.read_text()
    assert "# found     3 classes (class_0, class_1, class_2); 36 in train, 36 in eval" in text
    recipe = loading.load(str(out), [], methods.options_of)
    assert (recipe.target.params, recipe.name, recipe.data.image_size) == (0.6, "mine", 32)
    assert recipe.choice
    assert main(["check", str(out)]) == 0
    assert "groups are free" in capsys.readouterr().out
    assert main(words) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_new_names_images_that_cannot_be_read_and_a_missing_split(tmp_path, capsys):
    folder = fill(tmp_path / "only", count=20)
    (folder / "class_1" / "3.png").write_bytes(b"no image")
    out = tmp_path / "r.yaml"
    assert main(["new", "--data", str(folder), "--backbone", "resnet18.tv_in1k", "-o", str(out), "--json"]) == 0
    assert [line.split(":")[0].endswith("3.png") for line in json.loads(capsys.readouterr().out)["unreadable"]] == [
        True
    ]
    text = out.read_text()
    assert "WARNING: there is one split" in text
    assert "1 of them cannot be read" in text
    recipe = loading.load(str(out), [], methods.options_of)
    assert recipe.data.on_error == "skip"
    assert recipe.backbone.pretrained
    assert recipe.data.image_size == 32
    for data, wanted in ((tmp_path / "none", "there is no folder"), (folder / "class_0", "no class folders")):
        assert main(["new", "--data", str(data), "--backbone", "resnet18", "-o", str(tmp_path / "n.yaml")]) == 2
        assert wanted in capsys.readouterr().err
    assert main(["new", "--data", str(folder), "--backbone", "resnett18"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_batches_and_epochs_follow_from_the_count():
    assert choose_batch(100_000, 10) == 64
    assert choose_batch(100, 10) == 8
    assert choose_epochs(100_000, 64, True) == 5
    assert choose_epochs(640, 64, True) == 60
    assert choose_epochs(640, 64, False) == 200


def command(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [*start, "-m", "dist_prune.cli", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_weights_and_images_make_a_bundle(images, weights, tmp_path):
    out = tmp_path / "out"
    given = ("--backbone", "resnet8p_cifar", "--data", str(images), "--output", str(out))
    done = command("prune", str(weights), *given, "--json", "backbone.kwargs={img_size: 8}", *QUICK)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["method"] == "group_fisher"
    assert body["figures"]["repaired"]["macs"] < 0.6 * body["figures"]["dense"]["macs"]
    small = bundle.load(body["bundle"])
    assert small(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert json.loads((out / "method_choice.json").read_text())["method"] == "group_fisher"


@pytest.mark.slow
def test_a_bundle_goes_on_and_ranks_agree(images, weights, tmp_path):
    given = ("--backbone", "resnet8p_cifar", "--data", str(images), "--output")
    plans = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        done = command("prune", str(weights), *given, str(out), "backbone.kwargs={img_size: 8}", *QUICK, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next    dist-prune finetune") == 1
        plans.append(bundle.read_bundle(out).plan.fingerprint)
    assert plans[0] == plans[1]
    recipe = tmp_path / "mine.yaml"
    assert main(["new", "--data", str(images), "--backbone", "resnet8p_cifar", "-o", str(recipe)]) == 0
    quick = [word for word in QUICK if not word.startswith("target")]
    done = command(
        "finetune", str(tmp_path / "out1"), "--recipe", str(recipe), "--output", str(tmp_path / "fine"), *quick,
        "finetune.epochs=1", "finetune.warmup_epochs=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    new = bundle.read_bundle(tmp_path / "fine")
    assert new.plan.fingerprint == plans[0]
    assert new.body["origin"]["started_from"]["origin"]["method"] == new.body["origin"]["method"] == "group_fisher"
    again = command("prune", str(tmp_path / "fine"), "--data", str(images), "--output", str(tmp_path / "more"), *QUICK)
    assert again.returncode == 0, again.stderr
    assert sum(bundle.read_bundle(tmp_path / "more").plan.counts.values()) < sum(new.plan.counts.values())


def test_what_prune_refuses(images, weights, tmp_path, capsys):
    words = ["--data", str(images), "--output", str(tmp_path / "out")]
    for start, wanted in (
        ([str(weights)], "does not say which network"),
        ([str(tmp_path / "none"), "--backbone", "resnet18"], "there is no file or folder"),
        ([str(tmp_path)], "has no config.json"),
        ([str(weights), "--backbone", "resnet18", "--target", "half"], "write COST=SHARE"),
        ([str(weights), "--backbone", "resnet18", "--target", "flops=0.5"], "Write target.macs"),
        ([str(weights), "--backbone", "resnet18", "--method", "thinet"], "nearest: chip"),
        ([str(weights), "--backbone", "resnet18", "--target", "mac=0.5"], "the recipe 'out' of these options"),
        ([str(weights), "--backbone", "resnet18", "--target", "mac=0.5"], "Did you mean 'macs'?"),
        ([str(weights), "--backbone", "resnet18", "--target", "macs=5"], "the recipe 'out' of these options"),
    ):
        assert main(["prune", *start, *words]) == 2
        said = capsys.readouterr().err
        assert wanted in said
        assert ".yaml" not in said, "no file that is gone by now"


@pytest.mark.parametrize("words", [[], ["target.macs=0.5"]])
def test_run_without_a_recipe_says_what_to_write(words, capsys):
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert "dist-prune run quickstart" in said and "dist-prune new --data FOLDER" in said


def test_a_folder_as_timm_writes_it_knows_its_network(weights, tmp_path):
    from dist_prune.cli.prune import backbone_section

    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet8p_cifar", "model_args": {"img_size": 8}}))
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    assert backbone_section(tmp_path, None) == {
        "name": "resnet8p_cifar", "checkpoint": str(tmp_path / "model.safetensors"), "kwargs": {"img_size": 8},
    }  # fmt: skip
    given = tiny.bundled(tmp_path / "bundle")
    assert backbone_section(given, None)["bundle"] == str(given)
    with pytest.raises(PruneError, match="leave it out"):
        backbone_section(given, "resnet18")


@pytest.fixture(scope="module")
def unsorted(images, tmp_path_factory) -> Path:
    """The training images without their classes, in two folders of no meaning."""
    root = tmp_path_factory.mktemp("unsorted")
    for number, file in enumerate(sorted((images / "train").rglob("*.png"))):
        (root / "more").mkdir(exist_ok=True)
        place = root / ("more" if number % 3 else "") / f"{file.parent.name}, {file.name}"  # with a comma
        place.write_bytes(file.read_bytes())
    return root


def test_images_without_classes_are_found(images, unsorted, tmp_path):
    assert len(unlabelled(unsorted) or []) == 36
    assert len(unlabelled(images / "train" / "class_0") or []) == 12
    assert unlabelled(images) is None
    assert unlabelled(images / "train") is None
    assert unlabelled(tmp_path) is None
    with pytest.raises(PruneError, match="there is no folder"):
        unlabelled(tmp_path / "none")


def test_a_head_tells_its_classes(weights, tmp_path):
    spec = Backbone(name="resnet8p_cifar", checkpoint=str(weights), kwargs={"img_size": 8})
    assert class_names(spec) == ["0", "1", "2"]
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"label_names": ["ant", "bee", "cat"]}))
    assert class_names(spec.model_copy(update={"checkpoint": str(tmp_path / "model.safetensors")}))[1] == "bee"
    other = tmp_path / "alone" / "other.safetensors"
    other.parent.mkdir()
    tensors = tensor_files.read_tensors(weights)[0]
    tensor_files.save_tensors(other, {name: tensor for name, tensor in tensors.items() if tensor.shape[:1] != (3,)})
    with pytest.raises(PruneError, match="does not tell their number"):
        class_names(spec.model_copy(update={"checkpoint": str(other)}))


@pytest.mark.slow
def test_images_without_classes_make_a_bundle(unsorted, weights, tmp_path):
    """The network's own answers take the place of labels; any number of ranks makes the same plan."""
    plans = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        given = ("--backbone", "resnet8p_cifar", "--data", str(unsorted), "--output", str(out))
        done = command("prune", str(weights), *given, "backbone.kwargs={img_size: 8}", *QUICK, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "36 images have no classes: the network's own answers took their place" in done.stdout
        plans.append(bundle.read_bundle(out).plan.fingerprint)
        body = json.loads((out / "report.json").read_text())
        assert body["dense"]["top1"] == 100
        assert body["recipe"]["method"]["name"] == "reconstruction"
        rows = [(out / f"answers/{split}.csv").read_text().splitlines() for split in ("judge", "calibrate")]
        assert [len(lines) - 1 for lines in rows] == [9, 27]
    assert plans[0] == plans[1]
    # the same command goes on: answers that are there are kept
    before = (out / "answers/judge.csv").stat().st_mtime_ns
    again = command("prune", str(weights), *given, "backbone.kwargs={img_size: 8}", *QUICK)
    assert again.returncode == 0, again.stderr
    assert (out / "answers/judge.csv").stat().st_mtime_ns == before
