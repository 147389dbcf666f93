"""What makes a training fast changes nothing that is trained; rates by layer and name; trackers never stop a run."""

import json

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.config.training import Training
from dist_prune.errors import PruneError
from dist_prune.training import acceleration, optim, tracking
from dist_prune.training.acceleration import AcceleratedModel
from dist_prune.training.tracking import Tracker
from tests.support import tiny
from tests.training.test_training import digest, settings, trainer


def test_channels_last_trains_to_the_same_weights():
    found = trainer(None, channels_last=True)
    found.run()
    assert digest(found.model) == pytest.approx(digest_of_plain(), rel=1e-9, abs=1e-9)
    assert found.model.get_parameter("layer1.0.conv1.weight").is_contiguous(), "the artifact's order is torch's own"


def digest_of_plain() -> list[float]:
    found = trainer(None)
    found.run()
    return digest(found.model)


def test_channels_last_reaches_the_network():
    found, seen = trainer(None, channels_last=True, epochs=1), []
    weight = found.model.get_parameter("layer1.0.conv1.weight")
    found.model.get_submodule("layer1.0.conv2").register_forward_pre_hook(
        lambda m, x: seen.append(
            (
                x[0].is_contiguous(memory_format=torch.channels_last),
                weight.is_contiguous(memory_format=torch.channels_last),
            )
        )
    )
    found.run()
    assert (True, True) in seen


@pytest.mark.slow
def test_compiled_training_is_the_plain_one():
    """torch.compile through the C++ compiler of this machine: the same weights to rounding, the same names."""
    found = trainer(None, compile=True, epochs=1)
    found.run()
    one = trainer(None, epochs=1)
    one.run()
    assert digest(found.model) == pytest.approx(digest(one.model), rel=1e-6, abs=1e-6)
    assert set(found.model.state_dict()) == set(one.model.state_dict())


def test_synchronised_norms_come_and_go():
    """The layers are torch's synchronised ones while a training runs on several ranks, and what they were after it."""
    model = tiny.network()
    before, weights = dict(model.named_modules()), digest(model)
    body = AcceleratedModel(model, settings(sync_bn=True), tiny.machine(tiny.Communicator(0, 2)))
    kinds = {type(module).__name__ for module in model.modules()}
    assert "SyncBatchNorm" in kinds
    assert "BatchNorm2d" not in kinds
    model.get_submodule("bn1").running_mean.fill_(7.0)  # type: ignore[union-attr]
    body.restore()
    assert dict(model.named_modules()) == before
    assert float(model.get_submodule("bn1").running_mean[0]) == 7.0, "what was learned meanwhile stays"  # type: ignore[index]
    assert digest(model)[:1] == weights[:1]


@pytest.mark.parametrize(
    ("keys", "deterministic", "said"),
    [
        ({"precision": "fp16"}, False, r"train\.precision: fp16 is for GPUs"),
        ({"sync_bn": True}, False, r"train\.sync_bn: torch synchronises batch norms on GPUs only"),
        ({"compile": True}, True, r"cluster\.deterministic: train\.compile chooses kernels by timing"),
    ],
)
def test_what_this_machine_or_mode_cannot_do_is_refused(keys, deterministic, said):
    acceleration.check(Training(epochs=1), tiny.machine(), "train", deterministic)
    with pytest.raises(PruneError, match=said):
        acceleration.check(Training(epochs=1, **keys), tiny.machine(), "train", deterministic)


def test_rates_by_name():
    model = tiny.network()
    found = optim.parameter_groups(model, settings(lr_scales={"layer1.0.*": 0.1, "layer1.*": 0.5}))
    scale = {id(p): group.get("lr_scale", 1.0) for group in found for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["layer1.0.conv1.weight"])] == 0.1, "the first glob that fits"
    assert scale[id(named["conv1.weight"])] == 1.0
    optimizer = optim.create_optimizer(found, settings(lr=1.0))
    schedule = optim.LearningRate(optimizer, settings(lr=1.0, epochs=4), 10)
    schedule.set_for(20)
    assert schedule.rate == pytest.approx(0.5, abs=1e-6), "cosine, half way, whatever the scales"
    assert sorted({round(g["lr"], 6) for g in optimizer.param_groups}) == [0.05, 0.5]
    with pytest.raises(PruneError, match="unknown parameter glob 'layr1"):
        optim.parameter_groups(model, settings(lr_scales={"layr1.*": 0.1}))


def test_rates_by_layer_grow_towards_the_head():
    model = models.create("resnet18", 10, 3)
    found = optim.parameter_groups(model, settings(layer_decay=0.5))
    scale = {id(p): group.get("lr_scale", 1.0) for group in found for p in group["params"]}
    order = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer4.1.conv2.weight", "fc.weight"]
    rates = [scale[id(dict(model.named_parameters())[name])] for name in order]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    assert rates[0] < rates[1] < rates[2] < rates[3] <= rates[4]
    with pytest.raises(PruneError, match="does not say which layers follow"):
        optim.parameter_groups(nn.Sequential(nn.Linear(2, 2)), settings(layer_decay=0.5))


def test_training_accuracy_is_counted_over_all_ranks(pool):
    for world in (1, 2):
        found = pool.run(world, training_accuracy)
        assert all(value == found[0] for value in found)
        assert 100 / 10 < found[0] < 100
        assert found[0] * 200 / 100 == pytest.approx(round(found[0] * 2), abs=1e-9), "a whole number of 200 images"


def training_accuracy(ranks) -> float:
    return trainer(ranks, epochs=3).run()[-1]["top1"]


def test_trackers_by_name(tmp_path):
    tracking.check(("tensorboard",))
    with pytest.raises(PruneError, match=r"report\.trackers: unknown tracker 'tensorbord'.*tensorboard"):
        tracking.check(("tensorbord",))
    with pytest.raises(PruneError, match=r"report\.trackers: clearml is not installed; pip install clearml"):
        tracking.check(("clearml",))
    tracker = Tracker(True, ("tensorboard",), tmp_path)
    tracker.scalars({"train/loss": 1.5}, 3)
    tracker.hparams({"lr": 0.1, "method": {"name": "l1"}}, {"top1": 50.0})
    tracker.log_jsonl({"stage": "train", "loss": 1.5})
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 1.5)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.5


def test_a_tracker_that_breaks_is_switched_off_and_training_goes_on(tmp_path, capsys):
    tracker = Tracker(True, ("tensorboard",), tmp_path)
    assert not (tmp_path / "tensorboard").exists(), "a run that fails before its first value leaves no empty one"
    tracker.scalars({"train/loss": 1.5}, 0)
    tracker._boards["tensorboard"].tracker.close()  # as a full disk would: the writer's file is gone
    tracker._boards["tensorboard"].writer = None
    found = trainer(None, epochs=1)
    found.loop.tracker = tracker
    assert len(found.run()) == 1
    assert "tensorboard is off from here on" in capsys.readouterr().err
    assert digest(found.model) != digest(tiny.network())
