"""The dense network from weights that came from elsewhere: as they are, or trained further, with a head made anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dist_prune import methods, models
from dist_prune.config import loading
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.pipeline import runner
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.stages import train
from dist_prune.stages.train import classifier_names
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import tiny
from tests.support.launch import SMALL

# a training that moves nothing but statistics
STILL = ("train.lr=1e-12", "train.warmup_epochs=0", "train.weight_decay=0", "train.epochs=1", "train.selection=last")
RNG = np.random.default_rng(0)


def work_of(folder: Path, *words: str) -> RunContext:
    spec = loading.load("quickstart", [*SMALL, *words], methods.options_of)
    method = methods.find(spec.method["name"])
    return RunContext(spec, tiny.machine(), Tracker(True), folder, method(method.Options()))


def weights_of(made: StageOutput) -> dict[str, torch.Tensor]:
    return dict(made.tensors["dense.safetensors"][0])


def events(context: RunContext) -> str:
    return " | ".join(event["event"] for event in context.events)


def stored(folder: Path, classes: int, wrap: Any = lambda state: state, name: str = "resnet8p_cifar") -> Path:
    """A checkpoint of another number of classes, its statistics moved away from those of a fresh network."""
    torch.manual_seed(7)
    model = models.create(name, classes, 1, kwargs={"img_size": 8} if name == "resnet8p_cifar" else {})
    state = {key: tensor + 0.01 if "running_mean" in key else tensor for key, tensor in model.state_dict().items()}
    torch.save(wrap(state), folder / "elsewhere.pth")
    return folder / "elsewhere.pth"


def test_a_checkpoint_of_1000_classes_on_10(tmp_path, capsys):
    """The body is where training starts, the head is new and drawn by the seed; both are said."""
    file = stored(tmp_path, 1000, lambda state: {"state_dict": {f"module.{k}": t for k, t in state.items()}})
    context = work_of(tmp_path / "run", f"backbone.checkpoint={file}", *STILL)
    found, given = weights_of(train.run(context)), tensor_files.read_weights(file)
    fresh = context.networks.create_initial().state_dict()
    for name in ("conv1.weight", "layer2.0.conv1.weight", "layer3.0.bn2.bias"):
        assert torch.allclose(found[name], given[name], atol=1e-6)
        assert not torch.allclose(found[name], fresh[name], atol=1e-3) or name.endswith("bias")
    assert found["linear.weight"].shape == (10, 64)
    assert torch.allclose(found["linear.weight"], fresh["linear.weight"], atol=1e-6)
    said = "the head linear is re-initialised for 10 classes (that of elsewhere.pth has 1000 classes)"
    assert said in events(context)
    assert said in capsys.readouterr().out


def test_without_a_training_another_class_count_is_refused(tmp_path):
    file = stored(tmp_path, 1000)
    context = work_of(tmp_path / "run", f"backbone.checkpoint={file}", "train.epochs=0")
    with pytest.raises(
        PruneError, match=r"the data has 10 classes, the head 'linear' of .* has 1000.*or set train\.epochs"
    ):
        train.run(context)


def test_the_same_class_count_keeps_its_head(tmp_path):
    file = stored(tmp_path, 10)
    given = tensor_files.read_weights(file)
    as_it_is = weights_of(train.run(work_of(tmp_path / "a", f"backbone.checkpoint={file}", "train.epochs=0")))
    assert all(torch.equal(tensor, given[name]) for name, tensor in as_it_is.items())
    context = work_of(tmp_path / "b", f"backbone.checkpoint={file}", *STILL)
    moved = weights_of(train.run(context))
    assert torch.allclose(moved["linear.weight"], given["linear.weight"], atol=1e-6)
    assert not torch.allclose(moved["bn1.running_mean"], given["bn1.running_mean"]), "it was trained"
    assert "re-initialised" not in events(context)
    trained = weights_of(train.run(work_of(tmp_path / "c", f"backbone.checkpoint={file}", "train.epochs=1")))
    assert not torch.allclose(trained["conv1.weight"], given["conv1.weight"], atol=1e-3)


def test_a_body_without_a_head_can_only_be_trained(tmp_path):
    file = stored(tmp_path, 10, lambda state: {f"encoder.{k}": t for k, t in state.items() if "linear" not in k})
    with pytest.raises(PruneError, match="missing in the file: linear.weight"):
        train.run(work_of(tmp_path / "a", f"backbone.checkpoint={file}", "train.epochs=0"))
    context = work_of(tmp_path / "b", f"backbone.checkpoint={file}", *STILL)
    train.run(context)
    assert "the head linear is re-initialised for 10 classes (elsewhere.pth has none)" in events(context)
    skipping = work_of(
        tmp_path / "c", f"backbone.checkpoint={stored(tmp_path, 10)}", "backbone.checkpoint_skip=[linear.*]", *STILL
    )
    train.run(skipping)
    assert "left out of elsewhere.pth: linear.weight, linear.bias" in events(skipping)
    assert "re-initialised" in events(skipping)


def test_nothing_but_the_head_may_be_missing(tmp_path):
    file = stored(tmp_path, 1000, lambda state: {k: t for k, t in state.items() if not k.startswith("layer3")})
    with pytest.raises(PruneError, match=r"missing in the file: layer3\.0\.conv1\.weight"):
        train.run(work_of(tmp_path / "run", f"backbone.checkpoint={file}", *STILL))


def test_the_entry_that_was_asked_for(tmp_path):
    torch.manual_seed(1)
    file = stored(tmp_path, 10, lambda s: {"state_dict": s, "state_dict_ema": {k: 2 * t for k, t in s.items()}})
    words = (f"backbone.checkpoint={file}", "train.epochs=0")
    plain = tensor_files.read_weights(file, "state_dict")["conv1.weight"]
    context = work_of(tmp_path / "run", *words)
    assert torch.equal(weights_of(train.run(context))["conv1.weight"], 2 * plain)
    assert "the averaged weights of state_dict_ema are taken" in events(context)
    other = work_of(tmp_path / "run", *words, "backbone.checkpoint_key=state_dict")
    assert torch.equal(weights_of(train.run(other))["conv1.weight"], plain)
    assert other.events == []
    train_stage = runner.ORDER[0]
    marks = {runner.fingerprint(train_stage, one) for one in (context, other)}
    skipping = work_of(tmp_path / "run", *words, "backbone.checkpoint_skip=[x]")
    assert len(marks | {runner.fingerprint(train_stage, skipping)}) == 3, "another choice is another dense network"
    score = next(stage for stage in runner.ORDER if stage.name == "score")
    assert not any("checkpoint" in key for key in score.reads), "later stages know the dense weights by their digest"


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """timm's own way to weights, with a file in the place of the hub; 1,000 classes, as the registry says."""
    model = models.create("test_resnet", 1000, 3)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    plain = timm.create_model

    def fetched(name, **more):
        overlay = {"file": str(tmp_path / "timm.pth"), "url": "", "hf_hub_id": None}
        return plain(name, **more, **({"pretrained_cfg_overlay": overlay} if more.get("pretrained") else {}))

    monkeypatch.setattr(timm, "create_model", fetched)
    return ("backbone.name=test_resnet", "backbone.kwargs={}", "data.image_size=32"), model.state_dict()


def test_timms_weights_are_trained_with_a_new_head(tmp_path, pretrained):
    words, given = pretrained
    context = work_of(tmp_path / "run", *words, "backbone.pretrained=true", *STILL)
    found = weights_of(train.run(context))
    assert torch.allclose(found["layer1.0.conv1.weight"], given["layer1.0.conv1.weight"], atol=1e-6)
    assert found["fc.weight"].shape[0] == 10
    assert "the head fc is re-initialised for 10 classes (that of the published weights has 1000 classes)" in events(
        context
    )
    assert "the weights are for 3 channels: timm fits those of the first layer to 1" in events(context)
    with pytest.raises(PruneError, match=r"have 1000 classes, the data has 10: the head would be random"):
        train.run(work_of(tmp_path / "none", *words, "backbone.pretrained=true", "train.epochs=0"))


def test_a_file_wins_over_timms_weights_and_says_so(tmp_path):
    file = stored(tmp_path, 1000, name="test_resnet")
    context = work_of(
        tmp_path / "run", "backbone.name=test_resnet", "backbone.kwargs={}", "backbone.pretrained=true",
        "data.image_size=32", f"backbone.checkpoint={file}", *STILL,
    )  # fmt: skip
    train.run(context)  # fetching would fail here: there is no network
    assert "the published ones (backbone.pretrained) are not fetched" in events(context)


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    """What a person does where there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        PruneError, match=r"could not fetch the weights of 'resnet10t\.c3_in1k'.*backbone\.checkpoint=FILE"
    ):
        models.create("resnet10t.c3_in1k", 10, 3, pretrained=True)


def test_heads_by_whatever_name():
    for name, wanted in (
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("convnext_atto", {"head.fc.weight", "head.fc.bias"}),
        ("mobilenetv2_035", {"classifier.weight", "classifier.bias"}),
        (
            "deit_tiny_distilled_patch16_224",
            {f"head{part}.{kind}" for part in ("", "_dist") for kind in ("weight", "bias")},
        ),
    ):
        assert set(classifier_names(models.create(name, 10, 3))) == wanted


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve classes, each a pattern of its own, in folders 0 to 11; a network trained with natural numbers."""
    root = tmp_path_factory.mktemp("twelve")
    patterns = RNG.integers(0, 256, (12, 8, 8, 3))
    for split in ("train", "val"):
        for number, pattern in enumerate(patterns):
            for copy in range(6):
                place = root / split / str(number) / f"{copy}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                noisy = np.clip(pattern + RNG.normal(0, 8, pattern.shape), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(place)
    words = (
        "data.source=imagefolder", f"data.root={root}", "data.image_size=8", "data.crop=1.0", "data.mean=", "data.std=",
        "data.workers=0", "data.augment=none",
    )  # fmt: skip
    context = work_of(
        root / "run", *words, "data.class_order=natural", "train.epochs=12", "train.batch=24", "train.lr=0.05",
        "train.selection=last", "train.warmup_epochs=0",
    )  # fmt: skip
    tensor_files.save_tensors(root / "natural.safetensors", weights_of(train.run(context)))
    return words, root / "natural.safetensors"


def top1(context: RunContext) -> float:
    context.run_dir.mkdir(parents=True, exist_ok=True)
    tensor_files.save_tensors(context.run_dir / "dense.safetensors", weights_of(train.run(context)))
    return evaluate(
        context.networks.load_dense(), context.images.loader(False), 32, context.environment.comm, Tracker(False)
    )["top1"]


def test_classes_in_another_order_are_warned_of(twelve, tmp_path, capsys):
    """The network knows every image, and the order of the folders alone takes all but two classes of twelve from it."""
    words, file = twelve
    words = (*words, f"backbone.checkpoint={file}", "train.epochs=0")
    natural = work_of(tmp_path / "natural", *words, "data.class_order=natural")
    assert top1(natural) == 100
    assert natural.events == []
    assert "numbered in natural order: 0, 1, 2, 3" in capsys.readouterr().out
    mixed = work_of(tmp_path / "text", *words)
    assert top1(mixed) == pytest.approx(100 / 6)
    said = capsys.readouterr().out
    assert "12 classes, numbered in text order: 0, 1, 10, 11, 2" in said
    assert f"{'=' * 80}\nWARNING: class folders are numbered as text here" in said
    assert events(mixed).startswith("WARNING: ")
    chosen = work_of(tmp_path / "chosen", *words, "data.class_order=text")
    assert top1(chosen) == pytest.approx(100 / 6)
    assert chosen.events == []
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(map(str, range(12))))
    assert top1(work_of(tmp_path / "listed", *words, f"data.class_map={listed}")) == 100


def test_real_weights_of_1000_classes_on_twelve(twelve, data, tmp_path):
    """torchvision's names, a head of 1,000 rows, norms folded away: all of it is said, the body arrives."""
    words, _ = twelve
    file = data / "weights" / "mobilenetv2_imagenet_rot180.safetensors"
    context = work_of(
        tmp_path, *words, "backbone.name=mobilenetv2_100", "backbone.kwargs={}", "data.image_size=32",
        f"backbone.checkpoint={file}", *STILL, "train.batch=24",
    )  # fmt: skip
    found, given = weights_of(train.run(context)), tensor_files.read_weights(file)
    assert torch.allclose(found["conv_stem.weight"], given["features.0.0.weight"], atol=1e-5)
    assert torch.allclose(found["conv_head.weight"], given["features.18.0.weight"], atol=1e-5)
    assert found["classifier.weight"].shape == (12, 1280)
    head = f"the head classifier is re-initialised for 12 classes (that of {file.name} has 1000 classes)"
    assert head in events(context)
    assert "every batch norm of mobilenetv2_imagenet_rot180.safetensors has the variance 1" in events(context)


def test_a_new_head_cannot_be_mixed_up(twelve, tmp_path):
    words, _ = twelve
    torch.manual_seed(0)
    torch.save(models.create("resnet8p_cifar", 1000, 3, kwargs={"img_size": 8}).state_dict(), tmp_path / "a.pth")
    context = work_of(tmp_path / "run", *words, f"backbone.checkpoint={tmp_path / 'a.pth'}", *STILL, "train.batch=24")
    train.run(context)
    assert "re-initialised for 12 classes" in events(context)
    assert "WARNING" not in events(context)
