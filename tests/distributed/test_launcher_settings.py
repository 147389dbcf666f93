"""A launcher's own settings do not touch the arithmetic: by file, by flag, by the environment, and on resume."""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from dist_prune.distributed import launcher_settings
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from tests.support import launch

ONCE = str(launch.ROOT / "tests/support/launch_once.py")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: "NO"
use_cpu: true
num_machines: 1
num_processes: 1
machine_rank: 0
mixed_precision: bf16
dynamo_config: {dynamo_backend: EAGER}
"""


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "clip_grad"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile"),
    ],
)
def test_what_a_recipe_has_a_key_for_is_overridden(variable, value, key):
    environment = {variable: value, "OTHER": "1"}
    (line,) = launcher_settings.override_environment(environment)
    assert variable in line and f"={value} " in line and f"train.{key} and finetune.{key}" in line
    assert environment == {"OTHER": "1"}, "nobody reads it later"


def test_what_launchers_set_by_themselves_is_no_line():
    environment = {
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_USE_CPU": "True", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1",
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    }  # fmt: skip
    assert launcher_settings.override_environment(dict(environment)) == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP .*ZeRO"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, r"fp8 .*not offered.*train\.precision"),
        ({"ACCELERATE_FP8_BACKEND": "MSAMP"}, "fp8 .*not offered"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "TP_SIZE=2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage 0"),
    ],
)
def test_what_no_recipe_can_ask_for_is_refused(environment, said):
    with pytest.raises(PruneError, match=said):
        launcher_settings.override_environment(environment)


def test_deepspeed_s_config_is_the_recipe_s_where_it_computes():
    config = {
        "fp16": {"enabled": True, "loss_scale": 0}, "bf16": {"enabled": False}, "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
        "steps_per_print": float("inf"), "train_batch_size": "auto", "communication_data_type": "fp32",
    }  # fmt: skip
    lines = launcher_settings.override_deepspeed_config(config)
    assert [line.split()[1] for line in lines] == ["fp16", "gradient_clipping=0.5", "gradient_accumulation_steps=4"]
    assert "train.precision and finetune.precision" in lines[0] and "train.clip_grad" in lines[1]
    assert config["fp16"] == {"enabled": False, "loss_scale": 0}
    assert (config["gradient_clipping"], config["gradient_accumulation_steps"]) == (0.0, 1)
    assert launcher_settings.override_deepspeed_config(config) == [], "nothing is left to say"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"optimizer": {"type": "Adam"}},
            r"optimizer changes what is computed; the recipe decides by train\.optimizer",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, r"train\.schedule"),
        ({"communication_data_type": "fp16"}, "communication_data_type changes"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor changes"),
        ({"compression_training": {"weight_quantization": {}}}, "compression_training changes"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients rounds"),
        ({"zero_optimization": {"stage": 0}}, "zero_stage 0"),
    ],
)
def test_what_deepspeed_would_compute_otherwise_is_refused(config, said):
    with pytest.raises(PruneError, match=said):
        launcher_settings.override_deepspeed_config(config)


@pytest.fixture
def fresh():
    """accelerate remembers its settings for as long as the process lives."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


def test_a_machine_computes_as_if_nothing_had_been_asked(fresh, monkeypatch, capsys):
    """A real accelerator: the gradient of a float32 product, to the last bit."""
    for name, value in (
        ("MIXED_PRECISION", "bf16"), ("GRADIENT_ACCUMULATION_STEPS", "4"), ("DYNAMO_BACKEND", "EAGER"),
    ):  # fmt: skip
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    machine = DistributedEnvironment.start()
    assert capsys.readouterr().err.count("is not followed") == len(machine.overridden) == 3
    assert machine.accelerator is not None
    assert machine.accelerator.mixed_precision == "no"
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    (plain,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    wrapped = machine.wrap(model)
    machine.backward(wrapped(x).square().sum())
    assert model.weight.grad is not None and torch.equal(model.weight.grad, plain)


def once(start: tuple[str, ...], folder, *words: str, **environment: str) -> tuple[dict, str]:
    code, output = launch.run((*start, ONCE, str(folder)), None, *words, **environment)
    assert code == 0, output
    return json.loads(next(line for line in output.splitlines() if line.startswith("FOUND "))[6:]), output


@pytest.mark.slow
def test_file_flag_and_environment_change_no_bit(tmp_path):
    """Real launches, and one that goes on from another's checkpoint."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    plain, _ = once((sys.executable,), tmp_path / "plain")
    assert plain["overridden"] == []
    quiet, _ = once(ACCELERATE, tmp_path / "quiet")
    assert quiet == plain, "what accelerate sets by itself is no line"
    by_file = (*ACCELERATE[:3], "--config_file", str(config))
    by_flag = (*ACCELERATE, "--mixed_precision", "bf16", "--dynamo_backend", "eager")
    steps = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    for name, start, environment, names in (
        ("file", by_file, {}, ["mixed_precision=bf16", "dynamo_backend=EAGER"]),
        ("flag", by_flag, {}, ["mixed_precision=bf16", "dynamo_backend=EAGER"]),
        ("environment", ACCELERATE, steps, ["gradient_accumulation_steps=4"]),
        ("bare", (sys.executable,), {**steps, "ACCELERATE_MIXED_PRECISION": "bf16"},
         ["mixed_precision=bf16", "gradient_accumulation_steps=4"]),
    ):  # fmt: skip
        found, output = once(start, tmp_path / name, **environment)
        assert [line.split()[2] for line in found["overridden"]] == names, name
        assert all(line in output for line in found["overridden"])
        assert found["digest"] == plain["digest"], name
    once((sys.executable,), tmp_path / "resumed", "5")
    found, output = once(by_flag, tmp_path / "resumed")
    assert found["resumed"] == {"epoch": 0, "step": 4}
    assert "mixed_precision=bf16" in output
    assert found["digest"] == plain["digest"]
