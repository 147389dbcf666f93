"""On a device that is not the CPU everything gives what it gives on the CPU, and the host waits for it only so often.

The device is pretended (tests/support/pretend_device.py): kernels are the CPU's, so what is equal is equal to the bit,
and what is left on the wrong device raises as on a GPU.
"""

import numpy as np
import pytest
from PIL import Image

from dist_prune import methods
from tests.device import planted, runs, task_runs, traffic

ROUNDED = {
    "distillation": 0.03,
    "fp16": 0.03,
    "fp16, everything": 0.03,
}  # half precision where the CPU has none: relative
SEVERAL = ("schedules", "onecycle", "bf16, everything", "fp16, everything")  # at once: in the slow run
worlds = pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])


@pytest.mark.parametrize("name", planted.REFUSED)
def test_what_mixes_devices_is_refused(pretend, name):
    said = pretend.run(1, planted.said, name)[0]
    assert any(word in said for word in ("device", "numpy", "pinned", "cpu")), said


def test_what_cuda_lets_pass(pretend):
    assert pretend.run(1, planted.passes)[0] == [True] * 9


def test_syncs_and_bytes_are_counted(pretend):
    assert pretend.run(1, planted.counted)[0] == {
        "item": [1, 0, 4, 1], "list": [1, 0, 16, 1], "truth": [1, 0, 1, 2], "up": [1, 16, 0, 1],
        "up, not waited for": [0, 16, 0, 1], "down": [1, 0, 16, 1], "mask": [1, 0, 0, 1], "nonzero": [1, 0, 0, 1],
        "filled": [0, 0, 0, 1], "product": [0, 0, 0, 1], "view": [0, 0, 0, 0], "by one of its numbers": [1, 0, 8, 1],
    }  # fmt: skip


def test_a_tensor_left_on_the_cpu_is_caught(pretend):
    assert len(pretend.run(1, planted.left_behind, "cpu")[0]) == 64, "on a CPU nobody notices"
    assert "same device" in pretend.run(1, planted.left_behind, "pretend")[0]


def test_a_number_read_in_every_micro_batch_is_caught(pretend):
    plain, reading = pretend.run(1, planted.reads)[0]
    assert plain == 0
    assert reading >= 1


@pytest.mark.parametrize("name", methods.list_names())
def test_plans_are_the_cpu_s(pretend, name):
    assert pretend.run(1, runs.planned, "pretend", name) == pretend.run(1, runs.planned, "cpu", name)


@worlds
@pytest.mark.parametrize("name", ["taylor", "reconstruction"])
def test_the_library_with_batches_on_the_host(pretend, world, name):
    """Scored, selected, cut, repaired and searched where the network is."""
    found, wanted = (pretend.run(world, runs.library, kind, name) for kind in ("pretend", "cpu"))
    for one, other in zip(found, wanted, strict=True):
        assert one.pop("places") == {"pretend"} and other.pop("places") == {"cpu"}
        assert one == other == wanted[0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", methods.list_names())
def test_every_method_from_scores_to_the_tuned_network(pretend, name, world):
    """Scored, selected, cut, finetuned and judged: plan, accuracies and losses to the bit."""
    found = pretend.run(world, runs.whole, "pretend", name)
    assert found == pretend.run(world, runs.whole, "cpu", name)
    assert world == 1 or found[0]["plan"] == pretend.run(1, runs.planned, "cpu", name)[0]


@worlds
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SEVERAL)) for n in runs.OPTIONS])
def test_a_training_with_each_option(pretend, name, world):
    if name.startswith("fp16"):  # the CPU has none: the same training in full precision is near
        wanted = pretend.run(world, runs.option, "cpu", name, "fp32")[0]
    else:
        wanted = pretend.run(world, runs.option, "cpu", name)[0]
    found = pretend.run(world, runs.option, "pretend", name)[0]
    if name in ROUNDED:
        assert found["weights"] != wanted["weights"], "half precision leaves its mark"
        assert found["history"][0]["loss"] == pytest.approx(wanted["history"][0]["loss"], rel=ROUNDED[name])
        assert found["weights"] == pytest.approx(wanted["weights"], rel=ROUNDED[name], abs=0.1)
    else:
        assert found == wanted


def test_synchronised_norms_see_the_whole_batch(pretend):
    """torch's own SyncBatchNorm, which refuses CPUs, over two ranks: one process's training on the same batches."""
    two, one = (pretend.run(world, runs.synchronised)[0] for world in (2, 1))
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9, abs=1e-9)


@worlds
def test_killed_and_run_again_on_the_device(pretend, world, tmp_path):
    found = pretend.run(world, runs.resumed, "pretend", tmp_path, 3)
    assert found == pretend.run(world, runs.resumed, "cpu", tmp_path, 0)


@pytest.mark.parametrize(("first", "second"), [("pretend", "cpu"), ("cpu", "pretend")])
def test_a_checkpoint_goes_from_device_to_device(pretend, first, second, tmp_path):
    found = pretend.run(1, runs.crossed, first, second, tmp_path)
    assert found == pretend.run(1, runs.resumed, "cpu", tmp_path, 0)


@worlds
@pytest.mark.parametrize("what", [runs.carried, runs.recalibrated])
def test_carried_state_and_recalibration(pretend, what, world):
    assert pretend.run(world, what, "pretend") == pretend.run(world, what, "cpu")


LOOKS = {
    "none": {}, "crop": {"augment": "crop"}, "crop_flip": {"augment": "crop_flip"},
    "window": {"augment": "resized_crop_flip"}, "policy": {"auto_augment": "rand-m5-mstd0.5"},
    "erasing": {"erasing": 1.0}, "colour": {"erasing": 1.0, "erasing_mode": "rand"},
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_the_loaders_tail_on_arrays(pretend, look):
    found = pretend.run(1, runs.images, "pretend", LOOKS[look])[0]
    assert found == pretend.run(1, runs.images, "cpu", LOOKS[look])[0]


def test_the_loaders_tail_on_files(pretend, tmp_path):
    for number in range(8):
        folder = tmp_path / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    look = {"augment": "resized_crop_flip", "erasing": 0.5}
    found = pretend.run(1, runs.images, "pretend", look, str(tmp_path))[0]
    assert found == pretend.run(1, runs.images, "cpu", look, str(tmp_path))[0]


def test_a_bundle_from_the_device_and_on_it(pretend, tmp_path):
    """Cut on the device, exported, loaded, put on the device: logits, folded ones, and times."""
    made = {kind: pretend.run(1, runs.bundled, kind, tmp_path / kind)[0] for kind in ("cpu", "pretend")}
    assert made["cpu"] == made["pretend"]
    found = pretend.run(1, runs.served, "pretend", tmp_path / "pretend")[0]
    assert found == pretend.run(1, runs.served, "cpu", tmp_path / "cpu")[0]
    assert found["folds"] > 0 and found["timed"] == ["1", "4"]


RUNS = {
    "graph": (),
    "taylor, two rounds, carried": (
        "method.name=taylor", "schedule.rounds=2", "schedule.carry_optimizer=true", "finetune.ema=0.9",
        "finetune.recalibrate_bn=40",
    ),
    "mint, masked blocks": ("method={name: mint, p: [0.3], groups: 4}", "target.macs=null", "target.tolerance=null"),
    "sensitivity": ("method={name: sensitivity, epochs: 1}", "target.macs=null", "target.tolerance=null"),
    "entropy, with its curves": (
        "method={name: entropy, batch: 20}", "score.images=40", "information.curves=all", "information.images=20",
    ),
    "l1, several at once": ("method.name=l1", "score.compare=[apoz, hrank, fisher]"),
    "l1, to a time": (
        "method.name=l1", "target={latency: 0.9, tolerance: null, latency_tolerance: null, latency_batch: 4}",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run(pretend, name, tmp_path):
    found = pretend.run(1, runs.run_of, "pretend", tmp_path / "device", list(RUNS[name]))[0]
    if "time" in name:
        return  # what it measures is the moment's
    assert found == pretend.run(1, runs.run_of, "cpu", tmp_path / "cpu", list(RUNS[name]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation", "detection"])
def test_other_tasks(pretend, name, tmp_path):
    """Auxiliary heads and boxes: plan, losses and figures to the bit."""
    task_runs.write(name, tmp_path)
    found = pretend.run(1, task_runs.whole, "pretend", name, tmp_path)
    assert found == pretend.run(1, task_runs.whole, "cpu", name, tmp_path)


@pytest.mark.slow
def test_segmentation_waits_no_more(pretend, tmp_path):
    task_runs.write("segmentation", tmp_path)
    found = pretend.run(1, task_runs.waits, "segmentation", tmp_path)[0]
    assert found["training"].syncs <= 1 and found["evaluation"].syncs == 0, found


def per(pretend, work, *arguments, world: int = 1, **options) -> traffic.Each:
    return pretend.run(world, _per, work, arguments, options)[0]


def _per(ranks, work, arguments, options) -> traffic.Each:
    return work(traffic.Bed(ranks=ranks), *arguments, **options)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_training_step_waits_once_and_adds_little(pretend, augment):
    found, bare = (per(pretend, work, augment=augment) for work in (traffic.training, traffic.bare_training))
    assert found.syncs <= 1 and bare.syncs == 0, found.waits
    assert bare.operations < found.operations <= 1.1 * bare.operations


STEPS = (
    {"beside": "masks"}, {"beside": "bn_scale"}, {"beside": "group_norm"}, {"beside": "distillation"}, {"ema": 0.9},
    {"mixup": 0.2}, {"cutmix": 1.0}, {"clip_grad": 1.0}, {"accumulate": 2}, {"channels_last": True},
    {"optimizer": "adamw"}, {"precision": "bf16"}, {"skip_nonfinite": 1}, {"augment": "resized_crop_flip"},
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("settings", STEPS, ids=str)
def test_no_option_makes_a_step_wait_more(pretend, settings):
    found = per(pretend, traffic.training, **settings)
    assert found.syncs <= 1, found.waits


@pytest.mark.slow
def test_the_scaler_of_half_precision_waits_once_more(pretend):
    assert per(pretend, traffic.training, precision="fp16").waits == {"to the host": 1, "_local_scalar_dense": 1}


@pytest.mark.parametrize("name", traffic.QUIET)
def test_scoring_waits_for_nothing_until_the_merge(pretend, name):
    found = per(pretend, traffic.scoring, name)
    assert found.syncs == 0, found.waits


@pytest.mark.slow
def test_second_moments_are_asked_once_a_layer_whether_they_are_in_range(pretend):
    found = per(pretend, traffic.scoring, "reconstruction")
    assert found.waits == {"_local_scalar_dense": 9}, found.waits


def test_evaluation_waits_for_no_batch(pretend):
    found = per(pretend, traffic.evaluation)
    assert found.syncs == 0, found.waits


def test_numbers_of_ranks_go_through_the_cpu(pretend):
    """A group that takes a device's tensors only, as NCCL's does, gets one beside it for numbers and words."""
    assert pretend.run(2, runs.connected) == [{"before": [3, 1], "after": [3, 0], "words": ["0", "1"]}] * 2


@pytest.mark.slow
def test_ranks_do_not_wait_for_the_device_to_agree(pretend):
    """Whether anybody was asked to stop goes through the CPUs."""
    assert per(pretend, traffic.training, world=2).syncs <= 1
    assert per(pretend, traffic.evaluation, world=2).syncs == 0
    assert per(pretend, traffic.scoring, "graph", world=2).syncs == 0
