"""DeepSpeed: a real engine on one CPU process trains as plain torch does, and leaves the same artifacts."""

import json
import os
import sys
import time
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from dist_prune import models
from dist_prune.config.training import Training
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import unlock
from dist_prune.errors import PruneError
from dist_prune.pruning.plan.block_masks import mask_violations, weight_masks
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.training import deepspeed_engine
from tests.support import launch

CONFIG = launch.ROOT / "launch/cpu_1_zero2.yaml"
START = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file")
ZERO_ONCE = str(launch.ROOT / "tests/support/zero_once.py")


@pytest.fixture(scope="module")
def engine():
    if find_spec("deepspeed") and find_spec("transformers"):
        return
    reason = "DeepSpeed is not installed (the extra 'deepspeed')"
    if os.environ.get("DIST_PRUNE_MUST_RUN"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_on_one_process_is_plain_training(engine, stage, tmp_path):
    """SGD, AdamW, and averaged weights with mixing, clipping, accumulation and scaled rates; masks; resumed."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.read_text().replace("zero_stage: 2", f"zero_stage: {stage}"))
    code, output = launch.run((*START, str(config), ZERO_ONCE, str(tmp_path)), None)
    assert code == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("FOUND "))[6:])
    assert found["zero"] == stage
    assert found["resumed at"] == found["resumed without at"] == {"epoch": 0, "step": 4}
    for case in ("sgd", "adamw", "rich", "resumed", "resumed without"):
        assert found[case] < 1e-6, case
    for case in ("sgd", "adamw", "rich"):
        assert found[f"{case} masked"] == 0, case
    assert found["moved"] > 1e-3, "the training changed the weights"


@pytest.mark.deepspeed
def test_a_launch_config_that_wants_to_compute_otherwise(engine, tmp_path):
    """bf16, four accumulated steps and clipping in the launcher's config: the recipe's training all the same."""
    config = tmp_path / "config.yaml"
    text = CONFIG.read_text().replace('mixed_precision: "no"', "mixed_precision: bf16")
    config.write_text(text.replace("accumulation_steps: 1", "accumulation_steps: 4\n  gradient_clipping: 0.001"))
    code, output = launch.run((*START, str(config), ZERO_ONCE, str(tmp_path)), None)
    assert code == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("FOUND "))[6:])
    for case in ("sgd", "adamw", "rich", "resumed"):
        assert found[case] < 1e-6, case
    for name in ("mixed_precision=bf16", "gradient_accumulation_steps=4", "gradient_clipping=0.001"):
        assert f"the launcher's {name} " in output


@pytest.mark.deepspeed
def test_a_deepspeed_config_file_that_wants_to_compute_otherwise(engine, tmp_path):
    settings = {
        "zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4, "gradient_clipping": 0.001,
        "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 7,
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    head, _, tail = CONFIG.read_text().partition("deepspeed_config:\n")
    tail = "\n".join(line for line in tail.splitlines() if not line.startswith(" ") and "mixed_precision" not in line)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"{head}deepspeed_config:\n  deepspeed_config_file: {tmp_path}/ds.json\n  zero3_init_flag: false\n{tail}\n"
    )
    code, output = launch.run((*START, str(config), ZERO_ONCE, str(tmp_path)), None)
    assert code == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("FOUND "))[6:])
    for case in ("sgd", "adamw", "rich", "resumed"):
        assert found[case] < 1e-6, case
    for name in ("bf16", "gradient_accumulation_steps=4", "gradient_clipping=0.001"):
        assert f"DeepSpeed's {name} " in output


@pytest.mark.deepspeed
def test_a_whole_run_through_deepspeed(engine, tmp_path):
    import dist_prune

    folder = tmp_path / "run"
    code, output = launch.run((*START, str(CONFIG), launch.RUN), folder, *launch.SMALL, "finetune.ema=0.9")
    assert code == 0, output
    assert dist_prune.load(folder / "export") is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"train", "finetune"}
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    code, output = launch.run(launch.PYTHON, folder, *launch.SMALL, "finetune.ema=0.9")
    assert code == 0, output
    assert "finetune: done before, skipped" in output, "the artifacts are the same as any other run's"


@pytest.mark.deepspeed
def test_masked_weights_are_exact_zeros_behind_deepspeed(engine, tmp_path):
    """MINT from the scores to the bundle, with momentum, weight decay and averaged weights."""
    import dist_prune

    folder = tmp_path / "run"
    words = (
        *launch.SMALL, "method.name=mint", "target.macs=null", "method.groups=8", "method.p=[0.5]", "train.epochs=1",
        "finetune.momentum=0.9", "finetune.weight_decay=0.01", "finetune.ema=0.9", "score.balance=class",
    )  # fmt: skip
    code, output = launch.run((*START, str(CONFIG), launch.RUN), folder, *words)
    assert code == 0, output
    plan = Plan.from_json((folder / "round_1/plan.json").read_text())
    network = models.create("resnet8p_cifar", 10, 1, kwargs={"img_size": 8}).eval()
    channels = trace_groups(network, torch.zeros(1, 1, 8, 8))
    small, _ = tensor_files.read_tensors(folder / "round_1/pruned.safetensors")
    tuned, _ = tensor_files.read_tensors(folder / "finetuned.safetensors")
    masks = weight_masks(plan, channels, tuned)
    assert sum(int((~mask).sum()) for mask in masks.values()) > 1000, "beside the channels that were removed for real"
    assert mask_violations(tuned, masks) == []
    assert all(bool((tuned[name][mask] != 0).all()) for name, mask in masks.items()), "no other weight became zero"
    assert any(not torch.equal(tuned[name], small[name]) for name in masks), "the finetune changed the others"
    assert mask_violations(dist_prune.load(folder / "export").state_dict(), masks) == []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line["stage"] == "finetune" and line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_has_its_launch_config(stage):
    from accelerate.commands.config.config_args import load_config_from_file

    found: Any = load_config_from_file(str(launch.ROOT / f"launch/gpu_8_zero{stage}.yaml"))
    assert found.num_processes == 8
    assert str(found.distributed_type).endswith("DEEPSPEED")
    assert found.deepspeed_config["zero_stage"] == stage
    assert found.deepspeed_config["gradient_accumulation_steps"] == 1, "the loop accumulates"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optimizer": "lamb"}, r"finetune\.optimizer: 'lamb' looks at whole tensors"),
        ({"precision": "fp16"}, r"finetune\.precision: fp16 is not offered under ZeRO"),
        ({"skip_nonfinite": 1}, r"finetune\.skip_nonfinite"),
        ({"sync_bn": True}, r"finetune\.sync_bn"),
    ],
)
def test_what_zero_cannot_do_is_refused(keys, said):
    deepspeed_engine.check(Training(epochs=1), "finetune")
    with pytest.raises(PruneError, match=said):
        deepspeed_engine.check(Training(epochs=1, **keys), "finetune")


def test_locks_of_killed_builds_are_removed_and_young_ones_kept(tmp_path):
    for name, age in (("old", 3600), ("young", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        then = time.time() - age
        os.utime(tmp_path / name / "lock", (then, then))
    assert unlock(tmp_path) == [tmp_path / "old/lock"]
    assert [path.parent.name for path in tmp_path.glob("*/lock")] == ["young"]
    assert unlock(tmp_path / "nowhere") == []
