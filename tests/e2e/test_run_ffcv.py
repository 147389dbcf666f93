"""Whole runs on two ranks: the backend that serves the images moves nothing, as long as the file keeps their pixels."""

import pytest
from PIL import Image

import dist_prune
from dist_prune.cli import main as cli
from dist_prune.data.datasets import ArraySource, open_source
from tests.support.launch import SMALL, TORCHRUN, report, run

WORDS = (
    *SMALL, "data.source=imagefolder", "data.image_size=8", "data.crop=0.8", "data.mean=[0.3,0.3,0.3]",
    "data.std=[0.4,0.4,0.4]", "data.workers=2", "data.augment=resized_crop_flip", "train.epochs=1", "finetune.epochs=1",
    "score.images=60", "train.batch=32", "finetune.batch=32",
)  # fmt: skip


@pytest.mark.slow
def test_ffcv_and_torch_give_the_same_run(ffcv, tmp_path):
    for split, train, count in (("train", True, 300), ("val", False, 100)):
        source = open_source("digits", None, "", train)
        assert isinstance(source, ArraySource)
        for number in range(count):
            place = tmp_path / split / str(source.labels[number])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[number].repeat(3, axis=2)).resize((20, 14)).save(place / f"{number:03}.png")
        words = ["make-ffcv", "--source", str(tmp_path), "--write-mode", "raw", "--split", "train" if train else "eval"]
        assert cli.main(words) == 0
    found = {}
    for backend, said in (("auto", "ffcv backend"), ("torch", "torch backend")):
        folder = tmp_path / f"run_{backend}"
        code, output = run(TORCHRUN, folder, *WORDS, f"data.root={tmp_path}", f"data.backend={backend}")
        assert code == 0, output
        assert f"training images come through the {said}" in output
        body = report(folder)
        figures = [{k: body[what][k] for k in ("top1", "top5", "loss")} for what in ("dense", "pruned", "finetuned")]
        found[backend] = (body["plan"]["fingerprint"], figures)
    assert found["auto"] == found["torch"]


@pytest.mark.slow
def test_real_imagenet_images_end_to_end_through_both_backends(ffcv, data, tmp_path):
    """1,000 ImageNet validation images, pretrained MobileNetV2, two ranks: dense to bundle, the same on both."""
    recipe, root = "mobilenetv2_imagenet1000", tmp_path / "images"
    root.mkdir()
    (root / "val").symlink_to(data / "imagenet_1000_rot180" / "val")
    words = [
        f"data.root={root}",
        "data.image_size=96", "data.workers=1", "method.name=taylor", "score.images=64", "target.macs=0.7",
        "select.round_to=0", "finetune.epochs=1", "finetune.images=128", "finetune.batch=32", "finetune.lr=0.01",
        "finetune.selection=last", "report.latency_batches=[1]", "report.latency_repeats=2",
    ]  # fmt: skip
    making = ["make-ffcv", "--source", str(root), "--split", "eval", "--write-mode", "raw"]
    assert cli.main([*making, "--max-resolution", "9999"]) == 0  # whole images: the same pixels
    found = {}
    for backend in ("torch", "ffcv"):
        folder = tmp_path / backend
        code, output = run(TORCHRUN, folder, *words, f"data.backend={backend}", recipe=recipe)
        assert code == 0, output
        body = report(folder)
        model = dist_prune.load(folder / "export")
        assert sum(p.numel() for p in model.parameters()) == body["pruned"]["params"] < body["dense"]["params"]
        assert body["pruned"]["macs"] <= 0.7 * body["dense"]["macs"]
        figures = [{k: body[what][k] for k in ("top1", "top5", "loss")} for what in ("dense", "pruned", "finetuned")]
        found[backend] = (body["plan"]["fingerprint"], figures)
    assert found["torch"] == found["ffcv"]
    assert found["torch"][1][0]["top1"] > 40  # the pretrained network knows these images, at less than half their size
