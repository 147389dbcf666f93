"""What a training leaves to the next one, of a network that is cut in between: optimizer state, averaged weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.training import optim

OPTIMIZER = "optimizer/"


@dataclass(frozen=True)
class CarriedOptimizerState:
    """The state of a training by names, so that it can be cut as the network is.

    Attributes:
        tables: ``optimizer/<key>`` -> parameter -> a tensor of its shape (momentum_buffer, exp_avg ...); where weights
            were averaged, ``model`` and ``ema`` -> state dict.
        numbers: ``<key>/<parameter>`` -> a single number (step).
        plain: JSON values: ``groups``, ``state`` of the optimizer, the ``scaler``, ``updates`` of the averaged weights.
    """

    tables: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        packed: tuple[Mapping[str, Tensor], Mapping[str, Any]],
        averaged: nn.Module | None,
        updates: int,
    ) -> "CarriedOptimizerState":
        """A copy on the CPU of the state that ``packed`` (of TrainEngine.pack) holds by the numbers of parameters.

        Raises:
            PruneError: the optimizer keeps something that is neither shaped as its parameter nor a single number.
        """
        names, tables, numbers = _names(model, optimizer), {}, {}
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for place, tensor in packed[0].items():
            number, _, key = place.partition(".")
            name = names[int(number)]
            if tensor.shape == shapes[name] and tensor.is_floating_point():
                tables.setdefault(OPTIMIZER + key, {})[name] = _copy(tensor)
            elif tensor.numel() == 1:
                numbers[f"{key}/{name}"] = _copy(tensor)
            else:
                raise _uncut(optimizer, key, tensor, name, shapes[name])
        if averaged is not None:  # without averages the kept weights are the model's own
            tables["model"] = {name: _copy(tensor) for name, tensor in model.state_dict().items()}
            tables["ema"] = {name: _copy(tensor) for name, tensor in averaged.state_dict().items()}
        state = {f"{k.partition('.')[2]}/{names[int(k.partition('.')[0])]}": v for k, v in packed[1]["state"].items()}
        return cls(tables, numbers, {**packed[1], "state": state, "updates": updates})

    def for_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What TrainEngine.unpack takes, for a fresh ``optimizer`` of ``model``: its own rates, this state."""
        number = {name: str(i) for i, name in enumerate(_names(model, optimizer))}
        tensors = {
            f"{number[name]}.{table.removeprefix(OPTIMIZER)}": tensor
            for table, named in self.tables.items()
            if table.startswith(OPTIMIZER)
            for name, tensor in named.items()
        }
        singles = {"numbers": self.numbers, "state": self.plain["state"]}
        moved = {}
        for kind, values in singles.items():
            pairs = ((*place.partition("/")[::2], value) for place, value in values.items())
            moved[kind] = {f"{number[name]}.{key}": value for key, name, value in pairs}
        fresh = optimizer.state_dict()["param_groups"]
        groups = [{**before, **now} for before, now in zip(self.plain["groups"], fresh, strict=True)]
        return {**tensors, **moved["numbers"]}, {**self.plain, "state": moved["state"], "groups": groups}

    def prune(self, along: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> "CarriedOptimizerState":
        """The same of a network that was cut: ``along`` cuts tensors that are shaped as parameters and buffers."""
        return replace(self, tables={name: along(table) for name, table in self.tables.items()})

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and meta of a safetensors file; ``read`` takes them back."""
        tensors = {f"{table}/{name}": tensor for table, named in self.tables.items() for name, tensor in named.items()}
        return {**tensors, **{f"number/{place}": value for place, value in self.numbers.items()}}, dict(self.plain)

    @classmethod
    def from_file(cls, path: Path) -> "CarriedOptimizerState":
        """Of a file; PruneError where it is damaged."""
        return cls.from_tensors(*tensor_files.read_tensors(path))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> "CarriedOptimizerState":
        """What ``file`` gave."""
        tables: dict[str, dict[str, Tensor]] = {}
        numbers = {}
        for place, tensor in tensors.items():
            table, _, name = place.rpartition("/")
            if table.startswith("number/"):
                numbers[place.removeprefix("number/")] = tensor
            else:
                tables.setdefault(table, {})[name] = tensor
        return cls(tables, numbers, plain)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimizer's order."""
    found = {id(parameter): name for name, parameter in model.named_parameters()}
    return [found[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def check(settings: Training) -> None:
    """PruneError where the section's optimizer keeps a state that cannot be cut: found by one update of one layer."""
    layer = nn.Conv2d(160, 160, 3)
    found = optim.create_optimizer(optim.parameter_groups(layer, settings), settings)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    found.step()
    for name, parameter in layer.named_parameters():
        for key, value in found.state[parameter].items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                raise _uncut(found, key, value, name, parameter.shape)


def _uncut(optimizer: torch.optim.Optimizer, key: str, tensor: Tensor, name: str, shape: torch.Size) -> PruneError:
    return PruneError(
        f"schedule.carry_optimizer: {type(optimizer).__name__} keeps {key!r} of shape {tuple(tensor.shape)} "
        f"for {name}, which is {tuple(shape)}: it cannot be cut along. Choose another finetune.optimizer "
        "(sgd, adamw), or leave carry_optimizer out."
    )
