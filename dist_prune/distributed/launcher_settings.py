"""Launcher settings that would change the arithmetic: they are overridden by the recipe, or refused.

accelerate's flags, config files and plugins all reach a process as variables of its environment. DeepSpeed's config is
checked after its plugin has read it. Every start passes here, also that of a resumed run.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

from dist_prune.errors import PruneError

# variable, values that change nothing, accelerate's name of it, the recipe's key
OVERRIDDEN = (
    ("ACCELERATE_MIXED_PRECISION", ("no",), "mixed_precision", "precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "auto"), "gradient_accumulation_steps", "accumulate"),
    ("ACCELERATE_GRADIENT_CLIPPING", ("none", "auto", "0", "0.0"), "gradient_clipping", "clip_grad"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "dynamo_backend", "compile"),
)
# variable, accelerate's name of it, what to use instead
REFUSED = (
    ("ACCELERATE_USE_FSDP", "FSDP", "DeepSpeed's ZeRO shards too (launch/gpu_8_zero1.yaml to gpu_8_zero3.yaml)"),
    ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", "launch/gpu_8.yaml copies the network to every GPU"),
)
SIZES = ("DP_SHARD", "TP", "CP", "SP")
# DeepSpeed's keys that change no number, and those that deepspeed_engine.py sets itself
HARMLESS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing",
    "comms_logger", "flops_profiler", "tensorboard", "wandb", "comet", "csv_monitor", "monitor_config", "aio",
    "memory_breakdown", "checkpoint", "compile",
}  # fmt: skip
ENGINE = {  # DeepSpeed's key -> the recipe's
    "fp16": "precision", "bf16": "precision", "torch_autocast": "precision", "amp": "precision",
    "gradient_accumulation_steps": "accumulate", "gradient_clipping": "clip_grad",
}  # fmt: skip
INSTEAD = {"optimizer": "optimizer", "scheduler": "schedule"}  # refused: DeepSpeed's key -> the recipe's
NEUTRAL = ("fp32", 1, 1.0, "auto")


def override_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the launcher's settings of the training's arithmetic from the environment.

    Args:
        environment: the environment's variables; changed in place.

    Returns:
        A line of text for each setting that is overridden.

    Raises:
        PruneError: a setting that no recipe key stands for: sharding and splitting of the network, fp8.
    """
    problems = _refusals(environment)
    if problems:
        raise PruneError("\n".join(problems))
    lines = []
    for variable, neutral, name, key in OVERRIDDEN:
        value = environment.get(variable, "").strip()
        if value and value.lower() not in neutral:
            lines.append(
                f"the launcher's {name}={value} ({variable}, from its config, a flag or the environment) is not "
                f"followed: the recipe decides by train.{key} and finetune.{key}"
            )
            del environment[variable]
    return lines


def _refusals(environment: Mapping[str, str]) -> list[str]:
    def is_on(variable: str) -> bool:
        return environment.get(variable, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")

    problems = [
        f"the launcher asks for {name} ({variable}), which computes in a way that no recipe key describes; {instead}"
        for variable, name, instead in REFUSED
        if is_on(variable)
    ]
    if environment.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp8" or (
        environment.get("ACCELERATE_FP8_BACKEND", "").upper() == "MSAMP"
    ):
        problems.append(
            "the launcher asks for fp8 (ACCELERATE_MIXED_PRECISION, ACCELERATE_FP8_BACKEND), which is not offered; set "
            "its mixed_precision to no, and the recipe's train.precision and finetune.precision to fp32, bf16 or fp16"
        )
    if is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        names = [f"PARALLELISM_CONFIG_{size}_SIZE" for size in SIZES]
        split = [f"{name}={environment[name]}" for name in names if environment.get(name, "1") not in ("1", "0", "")]
        if split:
            problems.append(
                f"the launcher splits the network ({', '.join(split)}), which is not offered; leave its "
                "parallelism_config out (launch/gpu_8.yaml copies the network to every GPU)"
            )
    if is_on("ACCELERATE_USE_DEEPSPEED") and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "0":
        problems.append(_STAGE)
    return problems


_STAGE = (
    "the launcher asks for DeepSpeed with zero_stage 0, which shards nothing; set zero_stage to 1, 2 or 3, or launch "
    "without DeepSpeed (launch/gpu_8.yaml)"
)


def override_deepspeed_config(config: MutableMapping[str, Any]) -> list[str]:
    """Switch off the settings of DeepSpeed's config that belong to the recipe.

    Args:
        config: DeepSpeed's config after its plugin has read the launcher's file and variables; changed in place.

    Returns:
        A line of text for each setting that is overridden.

    Raises:
        PruneError: a key that changes the arithmetic and that no recipe key stands for.
    """
    lines: list[str] = []
    problems: list[str] = []
    zero = config.get("zero_optimization") or {}
    if zero.get("stage") == 0:
        problems.append(_STAGE)
    problems += [
        f"DeepSpeed's config: zero_optimization.{key} rounds the values that ranks exchange, which no recipe key "
        "describes; leave it out"
        for key, value in zero.items()
        if key.startswith("zero_quantized") and value
    ]
    for key, value in list(config.items()):
        if key in HARMLESS or _is_neutral(value):
            continue
        if key in ENGINE:
            if key == "amp":
                del config[key]
            elif isinstance(value, dict):
                config[key] = {**value, "enabled": False}
            else:
                config[key] = 1 if key == "gradient_accumulation_steps" else 0.0
            shown = "" if isinstance(value, dict) else f"={value}"
            lines.append(
                f"DeepSpeed's {key}{shown} (of the launcher's config) is not followed: the recipe decides by "
                f"train.{ENGINE[key]} and finetune.{ENGINE[key]}"
            )
        else:
            recipe_key = INSTEAD.get(key)
            advice = (
                f"the recipe decides by train.{recipe_key} and finetune.{recipe_key}; leave it out"
                if recipe_key
                else "leave it out"
            )
            problems.append(f"DeepSpeed's config: {key} changes what is computed; {advice}")
    if problems:
        raise PruneError("\n".join(problems))
    return lines


def _is_neutral(value: Any) -> bool:
    """Whether a value is off, absent or the default."""
    if isinstance(value, dict):
        return not value or str(value.get("enabled", True)).lower() == "false"
    return not value or value in NEUTRAL or str(value).lower() == "none"
