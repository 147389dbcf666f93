"""The training engine of DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) are sharded over ranks.

All that is saved is gathered into full tensors by parameter. So a checkpoint of one ZeRO stage resumes under another
one, under DDP, or on another number of processes.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.training.engine import TrainEngine

# optimizers whose update of a weight depends on its own gradient and state only: ZeRO flattens and splits tensors
ELEMENTWISE = ("sgd", "momentum", "nesterov", "adam", "adamw", "nadam", "nadamw", "radam", "rmsprop", "lion")


def check(settings: Training, name: str) -> None:
    """Check that ZeRO supports a training.

    Args:
        settings: the recipe's section.
        name: of the section, for messages.

    Raises:
        PruneError: it does not.
    """
    if settings.optimizer not in ELEMENTWISE:
        raise PruneError(
            f"{name}.optimizer: {settings.optimizer!r} looks at whole tensors, which ZeRO cuts into pieces; use one of "
            f"{', '.join(ELEMENTWISE)}, or launch without DeepSpeed"
        )
    if settings.precision == "fp16":
        raise PruneError(f"{name}.precision: fp16 is not offered under ZeRO; use bf16, or launch without DeepSpeed")
    if settings.skip_nonfinite:
        raise PruneError(f"{name}.skip_nonfinite: updates cannot be left out under ZeRO; launch without DeepSpeed")
    if settings.sync_bn:
        raise PruneError(f"{name}.sync_bn: is not offered under ZeRO; launch without DeepSpeed")


class DeepSpeedEngine(TrainEngine):
    """A TrainEngine through a DeepSpeed engine, in place of DDP; only one can exist at a time.

    Args:
        environment: device and ranks, with accelerate's DeepSpeed plugin.
        optimizer: of the parameters of ``model``; ZeRO replaces its tensors.
        model: the bare model.
        settings: ``precision``, ``clip_grad`` and ``compile`` of the recipe's section.
    """

    def __init__(
        self,
        environment: DistributedEnvironment,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        settings: Training,
    ):
        accelerator: Any = environment.accelerator
        # the order and groups of torch's optimizer, before ZeRO replaces them by flat tensors
        self._ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._groups = optimizer.state_dict()["param_groups"]
        amp = {"enabled": settings.precision == "bf16", "dtype": "bfloat16"}
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own loaders would read it
            "train_batch_size": environment.comm.world,
            "gradient_accumulation_steps": 1,  # the loop sets the last backward pass of a batch itself
            "gradient_clipping": settings.clip_grad or 0.0,
            "torch_autocast": amp,
        }
        self._engine, _ = accelerator.prepare(model, optimizer)
        super().__init__(environment, optimizer, model, self._engine)
        self._stage = self._engine.zero_optimization_stage()
        if settings.compile:
            self._engine.compile()

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    @property
    def _flat(self) -> list[Tensor]:
        """This rank's share of the float32 weights, one flat tensor per group."""
        return (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def zero_grad(self) -> None:
        self._engine.zero_grad()

    @contextlib.contextmanager
    def micro_step(self, last: bool):
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, limit: float | None, measured: bool) -> float | None:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @torch.no_grad()
    def apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        assert self.model is not None
        named = dict(self.model.named_parameters())
        for name, mask in masks.items():
            parameter = named[name]
            mask = mask.to(self.environment.device, torch.float32)
            with self._gathered([parameter], changed=True):
                parameter.data.mul_(mask)
            full: Any = safe_get_full_fp32_param(parameter)
            safe_set_full_fp32_param(parameter, full * mask)
            for key in self._state_keys():
                self._set_state(parameter, key, self._get_state(parameter, key) * mask)

    def full_weights(self) -> contextlib.AbstractContextManager[Any]:
        assert self.model is not None
        return self._gathered(list(self.model.parameters()))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, keys = {}, self._state_keys()
        counts = {k: v for k, v in self._state(self._flat[0]).items() if k not in keys} if self._flat else {}
        for number, parameter in enumerate(self._ordered):
            tensors |= {f"{number}.{key}": self._get_state(parameter, key).cpu() for key in keys}
            tensors |= {f"{number}.{key}": value.clone() for key, value in counts.items() if isinstance(value, Tensor)}
        plain = {
            f"{number}.{key}": value
            for number in range(len(self._ordered))
            for key, value in counts.items()
            if not isinstance(value, Tensor)
        }
        return tensors, {"state": plain, "groups": self._groups, "scaler": None}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        values: dict[str, dict[int, Any]] = {}
        for name, value in {**plain["state"], **tensors}.items():
            number, _, key = name.partition(".")
            values.setdefault(key, {})[int(number)] = value
        parameters = self._ordered
        full_keys = {
            key: by_number
            for key, by_number in values.items()
            if all(isinstance(v, Tensor) and v.shape == _shape(parameters[n]) for n, v in by_number.items())
        }  # the other keys are counts, the same for every parameter
        for flat in self._flat:
            state = self._zero.optimizer.state[flat]
            state.update({key: torch.zeros_like(flat) for key in full_keys})
            state.update(
                {key: next(iter(by_number.values())) for key, by_number in values.items() if key not in full_keys}
            )
        self._link()
        for key, by_number in full_keys.items():
            for number, value in by_number.items():
                self._set_state(parameters[number], key, value.to(self.environment.device, torch.float32))

    def close(self) -> None:
        """Destroy the DeepSpeed engine; the model keeps its full weights. Every rank calls it."""
        assert self.model is not None
        parameters = list(self.model.parameters())
        with self._gathered(parameters):
            full = [parameter.data.clone() for parameter in parameters]
        self._engine.destroy()
        for parameter, value in zip(parameters, full, strict=True):
            parameter.data = value

    def _gathered(self, parameters: list[Any], changed: bool = False) -> contextlib.AbstractContextManager[Any]:
        if self._stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None)

    def _state_keys(self) -> list[str]:
        """Keys of the optimizer's states that have a value per weight."""
        self._link()
        flat = self._flat[0]
        return [k for k, v in self._state(flat).items() if isinstance(v, Tensor) and v.numel() == flat.numel() > 1]

    def _link(self) -> None:
        """Link parameters and states; DeepSpeed does so after the first group's update, too early for the others."""
        if self._stage < 3 and all(self._state(flat) for flat in self._flat):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _state(self, flat: Tensor) -> dict[str, Any]:
        return self._zero.optimizer.state.get(flat, {})

    def _get_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        full = safe_get_full_optimizer_state(parameter, key)
        assert full is not None
        return full

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # sharded weights (ZeRO-3) are empty tensors
