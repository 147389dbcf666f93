"""What a recipe asks for and its task does not have is refused by ``dist-prune check`` and by a run, in equal words."""

import pytest

from dist_prune.cli.main import main
from dist_prune.run import main as run
from tests.support import masks

WORDS = (
    "backbone.kwargs={encoder: mobilenetv3_small_050, width: 4}", "data.image_size=32", "data.eval_split=val",
    "train.batch=8", "finetune.batch=8", "report.latency_batches=[1]",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    root = masks.write(tmp_path_factory.mktemp("camvid") / "camvid")
    patch.setenv("DIST_PRUNE_DATA", str(root.parent))
    yield root
    patch.undo()


def slow(words: list[str], text: str):
    return pytest.param(words, text, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["method.name=hrel"],
            "method.name: hrel needs one class number for each image; the task segmentation has none",
        ),
        (["score.compare=[taylor,hrel]", "train.mixup=0.2"], "method.name: hrel needs one class number"),
        slow(["score.compare=[taylor,hrel]", "train.mixup=0.2"], "train.mixup: the task segmentation cannot mix or"),
        slow(["finetune.label_smoothing=0.1"], "finetune.label_smoothing: the task segmentation cannot"),
        slow(["information.curves=all"], "information.curves: I(Z;Y) needs one class number for each image"),
        (["task.aux_wieght=1"], "task.aux_wieght: unknown key. Did you mean 'aux_weight'?"),
        (["task.name=segmentaton"], "task.name: unknown task 'segmentaton'"),
        (
            ["task.name=classification"],
            "task.name: classification learns from one class for each image; data.source=maskfolder gives a mask",
        ),
        (
            ["backbone.name=resnet18", "backbone.kwargs="],
            "backbone.name: in evaluation mode resnet18 gives a Tensor with tensor (2, 4), for two images; segment",
        ),
        (
            ["backbone.name=torchvision:fcn_resnet5", "backbone.kwargs="],
            "torchvision has no classifier, segmenter or detector 'fcn_resnet5'",
        ),
    ],
)
def test_check_and_a_run_refuse_alike(place, words, text, capsys, tmp_path):
    assert main(["check", "unet_camvid_taylor", *WORDS, *words]) == 2
    assert text in capsys.readouterr().err
    assert run(["--recipe", "unet_camvid_taylor", "--run-dir", str(tmp_path / "run"), *WORDS, *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run" / "dense.safetensors").exists()


def test_check_shows_the_groups_of_a_segmenter(place, capsys):
    assert main(["check", "unet_camvid_taylor", *WORDS]) == 0
    text = capsys.readouterr().out
    assert "input 3x32x32, 4 classes" in text
    assert "steps.0.up" in text
    assert "its channels are the network's outputs" in text


def test_other_verbs_refuse_what_they_cannot_read(place):
    assert main(["make-ffcv", "--source", "unet_camvid_taylor", "--out", "x.beton"]) != 0
