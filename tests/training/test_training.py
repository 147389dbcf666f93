"""The one loop: worlds agree, an interrupted run ends where an uninterrupted one does, keys do what they say."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import Batch, ImageLoader, TransformConfig
from dist_prune.data.sampling import holdout_split
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.training import optim
from dist_prune.training.bn_recalibration import recalibrate_bn
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.loop import Loop, StepFigures
from dist_prune.training.loss import TrainingLoss
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer
from tests.support import tiny

RICH = {"ema": 0.99, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "clip_grad": 1.0, "accumulate": 2}


def settings(**more) -> Training:
    return Training(**{"epochs": 2, "batch": 32, "lr": 0.05, "images": 200, "selection": "last", **more})


def loop(ranks: Communicator | None = None, **more) -> Loop:
    look = TransformConfig(8, (0.3,), (0.4,), augment="crop_flip")
    feed = ImageLoader(open_source("digits", None, "", True), look, torch.device("cpu"), dtype=torch.float64)
    return Loop(settings(**more), feed, tiny.machine(ranks), Tracker(False), 0)


def trainer(ranks: Communicator | None = None, folder: Path | None = None, judge=lambda m: {}, **more) -> Trainer:
    states = CheckpointManager(folder, "me", say=lambda text: None) if folder else None
    return Trainer(tiny.network(), loop(ranks, **more), judge, states=states, classes=10)


def digest(model: nn.Module) -> list[float]:
    return [float(tensor.double().sum()) for tensor in model.state_dict().values()]


class Killed(BaseException):
    """Stands for the end of a process: nothing in the package catches it."""


def kill_after(found: Trainer, updates: int) -> None:
    plain, count = found._after, [0]

    def after() -> None:
        plain()
        count[0] += 1
        if count[0] == updates:
            raise Killed

    found._after = after  # type: ignore[method-assign]


def interrupted(ranks: Communicator, folder: Path, updates: int, again: int) -> list[float]:
    """Killed after some updates, run again, killed again, run to the end."""
    for number in (updates, again):
        found = trainer(ranks, folder, save_every_steps=2, **RICH)
        kill_after(found, number)
        with pytest.raises(Killed):
            found.run()
        found.states.wait()  # type: ignore[union-attr]
    last = trainer(ranks, folder, save_every_steps=2, **RICH)
    last.run()
    return digest(last.model)


def uninterrupted(ranks: Communicator) -> list[float]:
    found = trainer(ranks, **RICH)
    found.run()
    return digest(found.model)


@pytest.mark.parametrize(("updates", "again"), [(3, 2), (7, 4), (10, 1)])
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_step_and_run_again_is_never_killed(world, updates, again, tmp_path, pool):
    """With augmentation, averaged weights, mixup, cutmix, clipping and accumulation on: the same weights to the bit."""
    whole = pool.run(world, uninterrupted)[0]
    found = pool.run(world, interrupted, tmp_path, updates, again)[0]
    assert found == whole


def on_two_then_one(ranks: Communicator, folder: Path) -> list[float]:
    found = still(trainer(ranks, folder, save_every_steps=2))
    if ranks.world == 2:
        kill_after(found, 5)
        with pytest.raises(Killed):
            found.run()
        found.states.wait()  # type: ignore[union-attr]
        return []
    found.run()
    assert found.resumed == {"epoch": 0, "step": 4}
    return digest(found.model)


def test_resume_on_another_number_of_ranks(tmp_path, pool):
    pool.run(2, on_two_then_one, tmp_path)
    assert pool.run(1, on_two_then_one, tmp_path)[0] == pytest.approx(frozen(Communicator()), rel=1e-9, abs=1e-9)


def plain(ranks: Communicator) -> list[float]:
    found = trainer(ranks)
    found.run()
    return digest(found.model)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    said: list[str] = []
    found = trainer(None, tmp_path, save_every_steps=2)
    kill_after(found, 9)
    with pytest.raises(Killed):
        found.run()
    found.states.wait()  # type: ignore[union-attr]
    files = sorted(tmp_path.glob("step_*.safetensors"))
    assert len(files) == 2, "the last two are kept"
    whole = files[-1].read_bytes()
    files[-1].write_bytes(whole[: len(whole) // 2])
    again = trainer(None, tmp_path)
    again.states.say = said.append  # type: ignore[union-attr]
    again.run()
    assert "damaged or cut short" in said[0]
    assert again.resumed == {"epoch": 1, "step": 0}
    assert digest(again.model) == plain(Communicator())


def test_a_checkpoint_of_another_training_is_left_alone(tmp_path):
    """A changed recipe starts over and keeps its own; whoever takes the change back goes on where that one was."""
    steps = 2 * loop().steps_per_epoch
    first = trainer(None, tmp_path, lr=0.01)
    first.run()
    other = trainer(None, tmp_path)
    other.states.identity = "someone else"  # type: ignore[union-attr]
    kill_after(other, 8)
    with pytest.raises(Killed):
        other.run()
    other.states.wait()  # type: ignore[union-attr]
    again = trainer(None, tmp_path)
    again.states.identity = "someone else"  # type: ignore[union-attr]
    again.run()
    assert other.resumed is None
    assert again.resumed == {"epoch": 1, "step": 0}
    assert digest(again.model) == plain(Communicator()) != digest(first.model)
    back = trainer(None, tmp_path, lr=0.01)
    back.run()
    assert back.resumed == {"epoch": 2, "step": 0}
    assert digest(back.model) == digest(first.model)
    assert len(list(tmp_path.glob(f"step_{steps:09}-*.safetensors"))) == 2


def test_checkpoints_are_counted_by_training(tmp_path):
    """The new one's first steps have lower numbers than the old one's last: they stay, and are found."""
    old, new = (CheckpointManager(tmp_path, name, keep=2, say=print) for name in ("old", "new"))
    for states, steps in ((old, (480, 490, 500)), (new, (10, 20, 30))):
        for step in steps:
            states.save(step, {"x": torch.ones(1)}, {})
        states.wait()
    assert str(new.newest()).startswith("step_000000030-")
    assert str(old.newest()).startswith("step_000000500-")
    assert [path.name[:14] for path in new.other_trainings()] == ["step_000000490", "step_000000500"]


def test_a_disk_that_refuses_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PruneError, match="could not write"):
        trainer(None, tmp_path / "file").run()


def test_training_learns():
    found = trainer(None, epochs=6, images=1000)
    history = found.run()
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert {"lr", "images_per_s", "grad_norm", "data_wait", "seconds"} <= history[0].keys()
    assert 0 <= history[0]["data_wait"] < 1


def test_worlds_agree_with_eval_mode_norms(pool):
    """Batch norms see their rank's share of a batch; without them the worlds differ by rounding only."""
    one = frozen(Communicator())
    for world in (2, 3):
        for found in pool.run(world, frozen):
            assert found == pytest.approx(one, rel=1e-9, abs=1e-9)


def still(found: Trainer) -> Trainer:
    """Batch norms stay in evaluation mode: no batch statistics, which depend on how a batch is dealt."""
    for module in found.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return found


def frozen(ranks: Communicator) -> list[float]:
    found = still(trainer(ranks))
    found.run()
    return digest(found.model)


def test_accumulation_is_the_whole_batch():
    def run(pieces: int) -> list[float]:
        found = still(trainer(None, accumulate=pieces))
        found.run()
        return digest(found.model)

    assert run(4) == pytest.approx(run(1), rel=1e-9, abs=1e-9)


def gates(ranks: Communicator, batch: int) -> list[float]:
    """Learn one gate per channel of a layer through the bench's fit."""
    model = tiny.network()
    bench = tiny.bench(model, ranks)
    gate = nn.Parameter(torch.ones(16, dtype=torch.float64))

    def loss(network, images, labels, ids):
        layer = network.get_submodule("layer1.0.bn1")
        hook = layer.register_forward_hook(lambda m, i, y: y * gate[None, :, None, None])
        try:
            return nn.functional.cross_entropy(network(images), labels, reduction="none")
        finally:
            hook.remove()

    steps: list[int] = []
    history = bench.train_parameters([gate], loss, epochs=1, lr=0.1, batch=batch, watch=steps.append)
    assert len(history) == 1
    assert steps == list(range(3)), "1347 images in batches of 450: every image once"
    return gate.tolist()


def test_gates_learn_at_the_rate_of_their_group():
    def moved(scale: float) -> float:
        gate = nn.Parameter(torch.ones(16, dtype=torch.float64))
        still = nn.Parameter(torch.ones(16, dtype=torch.float64))
        bench = tiny.bench(tiny.network())

        def loss(network, images, labels, ids):
            return ((gate + still) ** 2).mean() * torch.ones(len(ids), dtype=torch.float64)

        groups = [{"params": [gate], "lr_scale": scale}, {"params": [still], "lr_scale": 0.0}]
        bench.train_parameters(groups, loss, epochs=1, lr=0.01, batch=1347)
        assert still.tolist() == [1.0] * 16
        return float((1 - gate).detach().mean())

    assert moved(2.0) == pytest.approx(2 * moved(1.0))
    assert moved(1.0) > 0


def test_fit_agrees_over_worlds(pool):
    one = gates(Communicator(), 450)
    assert max(abs(value - 1) for value in one) > 1e-3
    for world in (2, 3):
        for found in pool.run(world, gates, 450):
            assert found == pytest.approx(one, abs=1e-12)


def test_a_loss_that_is_not_finite_stops_with_the_place():
    with pytest.raises(
        PruneError,
        match=r"not finite \(or huge\) at epoch 1, step \d+, learning rate 1e\+06 \(sample ids \[\d+, .*none yet",
    ):
        trainer(None, lr=1e6, schedule="constant").run()


def poisoned(ranks: Communicator, folder: Path) -> str:
    """The second rank's images turn strange in the second epoch."""
    found = trainer(ranks, folder, epochs=3)
    plain_batches = found.loop.loader.batches

    def batches(dealt, augment=None):
        for batch in plain_batches(dealt, augment):
            bad = augment is not None and augment[1] == 1 and ranks.rank == 1
            yield Batch(batch.images * float("nan"), batch.labels, batch.ids) if bad else batch

    found.loop.loader.batches = batches  # type: ignore[method-assign]
    with pytest.raises(PruneError) as error:
        found.run()
    return str(error.value)


def test_every_rank_names_the_images_and_the_last_good_checkpoint(tmp_path, pool):
    one, other = pool.run(2, poisoned, tmp_path)
    assert one == other
    assert "epoch 2, step 1" in one
    assert f"{tmp_path}/step_000000006-" in one
    assert "train.skip_nonfinite above 0" in one
    assert "(sample ids [" in one
    assert "and 8 more)" in one, "16 images: those of one rank"


def test_strange_updates_can_be_left_out():
    """What is left is the network of the other batches alone: no running statistic has seen the strange ones."""
    found = poison(trainer(None, skip_nonfinite=2, epochs=1), {1, 3})
    history = found.run()
    assert history[0]["skipped_updates"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in found.model.state_dict().values())
    norm = next(part for part in found.model.modules() if isinstance(part, torch.nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == found.loop.steps_per_epoch - 2  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path):
    """An update ruins the weights just before they would be saved: what was saved before stays the last good one."""
    found = trainer(None, tmp_path, save_every_steps=2, epochs=3)
    plain, count = found._after, [0]

    def after() -> None:
        plain()
        count[0] += 1
        if count[0] == 4:
            with torch.no_grad():
                next(found.model.parameters()).fill_(float("nan"))

    found._after = after  # type: ignore[method-assign]
    with pytest.raises(PruneError, match="step_000000002-"):
        found.run()
    assert not list(tmp_path.glob("step_000000004-*"))


def poison(found: Trainer, bad: set[int], good: list[Batch] | None = None) -> Trainer:
    """Some batches of every epoch turn strange; the others are noted in ``good``."""
    plain_batches = found.loop.loader.batches

    def poisoned(dealt, augment=None):
        for number, batch in enumerate(plain_batches(dealt, augment)):
            if number not in bad and good is not None:
                good.append(batch)
            yield Batch(batch.images * float("nan"), batch.labels, batch.ids) if number in bad else batch

    found.loop.loader.batches = poisoned  # type: ignore[method-assign]
    return found


def test_a_skipped_update_takes_no_other_update_s_hits_along():
    """A network that (almost) stands still: the training top-1 is its accuracy on the images that counted."""
    good: list[Batch] = []
    found = poison(still(trainer(None, skip_nonfinite=1, epochs=1, lr=1e-12)), {4}, good)
    history = found.run()
    found.model.eval()
    with torch.no_grad():
        hits = sum(int((found.model(batch.images).argmax(1) == batch.labels).sum()) for batch in good)
    count = sum(len(batch.ids) for batch in good)
    assert count < 200
    assert hits > 0
    assert history[0]["top1"] == pytest.approx(100 * hits / count)


@pytest.mark.parametrize(("spared", "moved"), [(0, True), (1, False)])
def test_an_update_is_on_its_way_before_the_loss_is_read_unless_it_may_be_spared(spared, moved, monkeypatch):
    """Reading waits; a device that has the next step to do meanwhile is not kept waiting."""
    found, seen = trainer(skip_nonfinite=spared, epochs=1), []
    before, backward, begun = digest(found.model)[0], found.loop._backward, [0]

    class Watched(StepFigures):
        @property
        def read(self):
            if not hasattr(self, "told"):
                seen.append((self.step, begun[0], digest(found.model)[0] != before))
                self.told = super().read
            return self.told

    def counted(*arguments):
        begun[0] += 1
        return backward(*arguments)

    monkeypatch.setattr("dist_prune.training.loop.StepFigures", Watched)
    found.loop._backward = counted  # type: ignore[method-assign]
    found.run()
    ahead = 1 if moved else 0
    steps = found.loop.steps_per_epoch
    assert [(step, min(step + 1 + ahead, steps)) for step in range(steps)] == [(step, at) for step, at, _ in seen]
    assert seen[0][2] is moved
    assert all(changed for _, _, changed in seen[1:])


def test_skipped_updates_are_counted_over_epochs_and_restarts(tmp_path):
    with pytest.raises(PruneError, match=r"epoch 2, step 2.*skip_nonfinite above 1"):
        poison(trainer(None, skip_nonfinite=1, epochs=3), {1}).run()
    found = poison(trainer(None, tmp_path, skip_nonfinite=2, epochs=3), {1})
    kill_after(found, 9)
    with pytest.raises(Killed):
        found.run()
    found.states.wait()  # type: ignore[union-attr]
    again = poison(trainer(None, tmp_path, skip_nonfinite=2, epochs=3), {1})
    with pytest.raises(PruneError, match="epoch 3, step 2"):
        again.run()
    assert again.resumed == {"epoch": 1, "step": 0}


def test_the_best_epoch_is_kept_and_patience_ends():
    tops = iter([50.0, 80.0, 70.0, 60.0, 90.0])
    seen: list[list[float]] = []

    def judge(model):
        seen.append(digest(model))
        return {"top1": next(tops)}

    found = trainer(None, judge=judge, selection="test", epochs=5, patience=2)
    history = found.run()
    assert [line["epoch"] for line in history] == [1, 2, 3, 4]
    assert digest(found.model) == seen[1]


def test_held_out_images_are_not_trained_on():
    train, held = holdout_split(np.arange(1000), 0.1, 0)
    assert len(held) == 100
    assert sorted([*train, *held]) == list(range(1000))
    assert held.tolist() != holdout_split(np.arange(1000), 0.1, 1)[1].tolist()
    assert len(holdout_split(np.arange(1000), 0.0, 0)[1]) == 0


def test_masked_weights_stay_exact_zeros_momentum_included():
    found = trainer(None)
    mask = (torch.rand(found.model.get_submodule("layer1.0.conv1").weight.shape) < 0.5).double()  # type: ignore[union-attr]
    found.masks = {"layer1.0.conv1.weight": mask}
    found.run()
    weight = dict(found.model.named_parameters())["layer1.0.conv1.weight"]
    assert bool((weight[mask == 0] == 0).all())
    assert bool((weight[mask == 1] != 0).all())
    assert bool((found.engine.optimizer.state[weight]["momentum_buffer"][mask == 0] == 0).all())


def test_averaged_weights_are_what_is_judged_and_kept():
    judged: list[list[float]] = []
    found = trainer(None, judge=lambda m: judged.append(digest(m)) or {}, ema=0.9)
    found.run()
    assert digest(found.model) == judged[-1]
    assert digest(found.model) != plain(Communicator())


def test_norms_and_biases_do_not_decay_by_type_not_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn_like_name = nn.Linear(4, 4)
            self.plain = nn.BatchNorm1d(4)
            self.vector = nn.Parameter(torch.ones(4))

    model = Odd()
    decayed, spared = optim.parameter_groups(model, settings(weight_decay=0.1))
    assert {id(p) for p in decayed["params"]} == {id(model.bn_like_name.weight), id(model.vector)}
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    (everything,) = optim.parameter_groups(model, settings(weight_decay=0.1, decay_norm_bias=True))
    assert len(everything["params"]) == 5


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adamw", "AdamW"), ("lamb", "Lamb")])
def test_optimizers_by_timm_s_names(name, kind):
    found = optim.create_optimizer([nn.Parameter(torch.ones(2))], settings(optimizer=name))
    assert type(found).__name__ == kind
    assert not found.param_groups[0].get("nesterov")


def test_a_batch_too_small_for_the_ranks():
    with pytest.raises(PruneError, match=r"train\.batch: 1 .* is too small for 1 process"):
        trainer(None, batch=1).run()
    with pytest.raises(PruneError, match=r"train\.batch: 2 \(of 5 images\) .* the smallest would be 1"):
        trainer(None, batch=2, images=5).run()


def test_unknown_optimizers_and_arguments():
    with pytest.raises(PruneError, match="unknown optimizer 'adamv'"):
        optim.create_optimizer([nn.Parameter(torch.ones(2))], settings(optimizer="adamv"))
    with pytest.raises(PruneError, match="optimizer_kwargs"):
        optim.create_optimizer([nn.Parameter(torch.ones(2))], settings(optimizer_kwargs={"nonsense": 1}))
    with pytest.raises(PruneError, match="optimizer_kwargs: adamw does not take .*Invalid beta"):
        optim.create_optimizer(
            [nn.Parameter(torch.ones(2))], settings(optimizer="adamw", optimizer_kwargs={"betas": [2, 2]})
        )
    with pytest.raises(PruneError, match=r"Nesterov momentum requires a momentum"):
        optim.create_optimizer([nn.Parameter(torch.ones(2))], settings(optimizer="nesterov", momentum=0))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "step", "step_size": 2}, [1, 1, 0.1, 0.1]),
        ({"schedule": "multistep", "milestones": (1, 3), "gamma": 0.5}, [1, 0.5, 0.5, 0.25]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "constant", "warmup_epochs": 2, "warmup_lr": 0.0}, [0, 0.5, 1, 1]),
    ],
)
def test_schedules(more, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0)
    schedule = optim.LearningRate(optimizer, settings(epochs=4, lr=1.0, **more), 10)
    found = []
    for epoch in range(4):
        schedule.set_for(10 * epoch)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("epochs", "per_epoch", "warmup"), [(10, 10, 0.0), (3, 7, 1.0), (1, 3, 0.0), (7, 5, 0.0)])
def test_one_cycle_climbs_to_the_full_rate_and_falls_without_a_jump(epochs, per_epoch, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0)
    asked = settings(epochs=epochs, lr=1.0, schedule="onecycle", warmup_epochs=warmup, warmup_lr=0.04)
    schedule = optim.LearningRate(optimizer, asked, per_epoch)
    rates = []
    for update in range(epochs * per_epoch):
        schedule.set_for(update)
        rates.append(schedule.rate)
    peak = round((warmup or 0.3 * epochs) * per_epoch)
    left = epochs * per_epoch - peak
    assert rates[: peak + 1] == pytest.approx([0.04 + 0.96 * t / peak for t in range(peak + 1)])
    assert rates[peak:] == pytest.approx([(1 + math.cos(math.pi * t / left)) / 2 for t in range(left)])


@pytest.mark.parametrize("schedule", ["constant", "step", "multistep", "cosine", "linear", "onecycle"])
def test_a_warm_up_longer_than_the_training_is_refused(schedule):
    """A cosine of 5 epochs behind a warm-up of 15 ended at a third of the rate that was asked for."""
    for warmup in (3.5, 15) + ((3,) if schedule == "onecycle" else ()):
        with pytest.raises(ValueError, match=rf"schedule {schedule} climbs .*warmup_epochs has to be smaller"):
            settings(epochs=3, schedule=schedule, warmup_epochs=warmup)
    assert settings(epochs=3, schedule=schedule, warmup_epochs=2.5).warmup_epochs == 2.5
    assert settings(epochs=0, schedule=schedule, warmup_epochs=5).epochs == 0, "nothing is trained"


def objective(teacher=None, **more) -> TrainingLoss:
    return TrainingLoss(settings(**more), 10, 0, teacher, lambda: torch.autocast("cpu", enabled=False))


def some_batch(n: int = 9) -> Batch:
    return next(tiny.digits_feed().batches([np.arange(n)]))


def test_mixing_is_seeded_by_epoch_and_step_and_leaves_numpy_alone():
    model, batch = tiny.network(), some_batch()
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    found = [objective(mixup=1.0, cutmix=1.0)(model, batch, 1, step).tolist() for step in (4, 4, 5)]
    assert found[0] == found[1] != found[2]
    assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[arg-type]
    assert len(found[0]) == 9


def test_distillation_pulls_to_the_teacher():
    student, teacher, batch = tiny.network(0), tiny.network(1), some_batch()
    same = objective(student, distill=1.0)(student, batch, 0, 0)
    other = objective(teacher, distill=1.0)(student, batch, 0, 0)
    assert float(same.detach().abs().max()) < 1e-9, "a student that is its teacher has nothing to learn"
    assert float(other.detach().min()) > 0
    half = objective(teacher, distill=0.5)(student, batch, 0, 0)
    hard = objective()(student, batch, 0, 0)
    assert torch.allclose(half, 0.5 * hard + 0.5 * other)


def test_bf16_trains():
    found = trainer(None, precision="bf16")
    found.model.float()
    found.loop.loader = ImageLoader(found.loop.loader.source, found.loop.loader.transform, torch.device("cpu"))
    assert math.isfinite(found.run()[-1]["loss"])


def recalibrated(ranks: Communicator) -> list[float]:
    model = tiny.network()
    assert recalibrate_bn(model, tiny.digits_feed(), np.arange(100), 16, ranks) == 9
    return digest(model)


def test_recalibrated_norms_are_the_same_bits_for_every_world(pool):
    found = [result for world in (1, 2, 3) for result in pool.run(world, recalibrated)]
    assert all(result == found[0] for result in found)
    assert found[0] != digest(tiny.network())


def test_recalibration_of_one_batch_is_that_batch_s_statistics():
    model, feed = tiny.network(), tiny.digits_feed()
    batch = next(feed.batches([np.arange(64)]))
    maps = model.get_submodule("conv1")(batch.images)
    recalibrate_bn(model, feed, np.arange(64), 64, Communicator())
    norm = model.get_submodule("bn1")
    assert torch.allclose(norm.running_mean, maps.mean((0, 2, 3)))  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, maps.var((0, 2, 3)))  # type: ignore[arg-type]
    assert not model.training
