"""What a recipe says of a training: checked before any work, fingerprinted where it decides something, marked."""

from pathlib import Path

import numpy as np
import pytest

from dist_prune import methods, models
from dist_prune.config import loading
from dist_prune.config.recipe import selected_on_test
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.distributed import preemption, tensor_files
from dist_prune.errors import PruneError
from dist_prune.pipeline import runner
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.precheck import precheck
from dist_prune.pruning.plan.plan import Plan
from dist_prune.stages import finetune
from dist_prune.stages.training_setup import selection_metric
from dist_prune.training.tracking import Tracker
from tests.support import tiny
from tests.support.launch import SMALL


def work_of(folder: Path, *words: str) -> RunContext:
    spec = loading.load("quickstart", [*SMALL, *words], methods.options_of)
    method = methods.find(spec.method["name"])
    return RunContext(spec, tiny.machine(), Tracker(False), folder, method(method.Options()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("finetune.optimizer=adamv",), r"finetune\.optimizer: unknown optimizer 'adamv'"),
        (
            ("finetune.optimizer=adamw", "finetune.optimizer_kwargs={betas: [2, 2]}"),
            r"^finetune\.optimizer_kwargs: adamw",
        ),
        (("train.optimizer=nesterov", "train.momentum=0"), r"^train\.optimizer_kwargs: nesterov does not take"),
        (("train.lr_scales={nothere*: 0.1}",), r"^train\.lr_scales: unknown parameter glob 'nothere\*'"),
        (("finetune.layer_decay=0.5",), r"^finetune\.layer_decay: ResNetCifar does not say"),
        (("train.images=5", "train.batch=2", "train.selection=last"), r"^train\.batch: 2 \(of 5 images\) is too small"),
    ],
)
def test_found_out_before_any_work(tmp_path, words, said):
    precheck(work_of(tmp_path))
    with pytest.raises(PruneError, match=said):
        precheck(work_of(tmp_path, *words))


@pytest.mark.parametrize(("selection", "images"), [("holdout", "held-out images"), ("test", "test images")])
def test_a_stop_while_epochs_are_judged_names_the_training(tmp_path, monkeypatch, selection, images):
    context = work_of(tmp_path, f"finetune.selection={selection}")
    metric = selection_metric(context, context.recipe.finetune, "finetune")
    monkeypatch.setattr(preemption, "requested", lambda: True)
    with pytest.raises(preemption.PreemptedError, match=f"in finetune, {images}; the same command resumes"):
        metric(models.create("resnet8p_cifar", 10, 1))


def test_all_of_it_at_once_and_nothing_of_a_training_that_is_not_done(tmp_path):
    words = ("train.optimizer=adamv", "finetune.lr_scales={nothere*: 2}", "target.macs=0.00001")
    with pytest.raises(PruneError) as error:
        precheck(work_of(tmp_path, *words[:2]))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["train.optimizer", "finetune.lr_scales"]
    (tmp_path / "dense.safetensors").touch()
    dense = f"backbone.checkpoint={tmp_path}/dense.safetensors"
    precheck(work_of(tmp_path, words[0], dense, "train.epochs=0"))
    with pytest.raises(PruneError, match=r"^train\.optimizer: unknown optimizer 'adamv'"):
        precheck(work_of(tmp_path, words[0], dense))


def test_learning_from_a_checkpoint_is_a_training(tmp_path):
    """It is checked before any work, and marked where the test images select its epoch."""
    (tmp_path / "dense.safetensors").touch()
    words = (f"backbone.checkpoint={tmp_path}/dense.safetensors", "train.optimizer=adamv", "train.selection=test")
    spared = work_of(tmp_path, *words, "train.epochs=0")
    precheck(spared)
    assert selected_on_test(spared.recipe.resolved()) == []
    for more in ((), ("train.sparsity=bn_scale",)):
        learning = work_of(tmp_path, *words, *more)
        with pytest.raises(PruneError, match=r"^train\.optimizer: unknown optimizer 'adamv'"):
            precheck(learning)
        assert selected_on_test(learning.recipe.resolved()) == ["train: the kept epoch was selected on the test images"]


def test_how_a_training_is_kept_safe_does_not_decide_what_it_ends_in(tmp_path):
    def fingerprint(*words: str) -> str:
        return runner.fingerprint(runner.ORDER[0], work_of(tmp_path, *words))

    safety = ("save_every_steps=3", "checkpoint_every_minutes=1", "keep_checkpoints=5", "skip_nonfinite=2")
    assert fingerprint(*(f"train.{word}" for word in safety)) == fingerprint()
    assert fingerprint("train.lr=0.2") != fingerprint()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), []),
        (("train.selection=test", "finetune.selection=last"), ["train: the kept epoch was selected"]),
        (("train.selection=last", "train.patience=2"), ["train: the last epoch was chosen"]),
        (("finetune.selection=test", "finetune.patience=2"), ["finetune: the kept epoch was selected"]),
        (("finetune.selection=test", "finetune.epochs=0"), []),
        (("train.patience=3", "finetune.patience=3"), []),
        (("train.selection=test", "backbone.checkpoint=dense.safetensors", "train.epochs=0"), []),
        (("train.selection=test", "backbone.checkpoint=dense.safetensors"), ["train: the kept epoch was selected"]),
    ],
)
def test_what_the_test_images_decided(tmp_path, words, said):
    found = selected_on_test(work_of(tmp_path, *words).recipe.resolved())
    assert len(found) == len(said)
    assert all(line.startswith(start) and "on the test images" in line for line, start in zip(found, said, strict=True))


def test_batch_norms_are_recalibrated_on_images_of_every_class(tmp_path, monkeypatch):
    """Training images sorted by class, as folders are; none of those that are held out."""
    source = open_source("digits", None, "", True)
    assert isinstance(source, ArraySource)
    order = np.argsort(source.labels, kind="stable")[::4]
    images, labels = source.images[order], source.labels[order]
    np.savez(tmp_path / "sorted.npz", x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])
    context = work_of(
        tmp_path, "data.source=npz", f"data.root={tmp_path}/sorted.npz", "finetune.recalibrate_bn=40",
        "finetune.epochs=0", "score.balance=class",
    )  # fmt: skip
    weights = context.networks.create_initial().state_dict()
    plan = Plan({}, {group.name: group.width for group in context.networks.graph.groups})
    for name in ("dense", "round_1/pruned"):
        tensor_files.save_tensors(tmp_path / f"{name}.safetensors", weights)
    (tmp_path / "round_1/plan.json").write_text(plan.to_json())
    seen: list[np.ndarray] = []
    real = finetune.recalibrate_bn

    def noted(model, feed, ids, *more):
        seen.append(ids)
        return real(model, feed, ids, *more)

    monkeypatch.setattr(finetune, "recalibrate_bn", noted)
    made = finetune.run(context)
    assert np.bincount(labels[seen[0]]).tolist() == [4] * 10
    assert set(seen[0].tolist()) <= set(context.images.training_split(context.recipe.finetune)[0].tolist())
    tuned = made.tensors["finetuned.safetensors"][0]
    assert not np.allclose(tuned["bn1.running_mean"], weights["bn1.running_mean"])
