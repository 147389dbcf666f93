"""Optimizer state and averaged weights that are carried from one training to the next, across pruning."""

import inspect
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
    """The state of a training by names of parameters, so that it can be pruned as the network is.

    Attributes:
        tables: ``optimizer/<key>`` -> name of a parameter -> tensor of its shape (momentum_buffer, exp_avg ...); if
            weights were averaged, also ``model`` and ``ema`` -> state dict.
        numbers: ``<key>/<parameter>`` -> tensor of a single number (step).
        plain: JSON values: ``groups`` and ``state`` of the optimizer, the ``scaler``, ``updates`` of the averaged
            weights.
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
        """Copy the state of a training to the CPU.

        Args:
            model: the bare model.
            optimizer: of its parameters.
            packed: what ``TrainEngine.state`` returned.
            averaged: the averaged weights, or None.
            updates: number of updates of the averaged weights.

        Raises:
            PruneError: a state of the optimizer is neither of its parameter's shape nor a single number.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state = cls.of_optimizer(optimizer, names, shapes, packed)
        tables = dict(state.tables)
        if averaged is not None:  # without averages the final weights are the model's own
            tables["model"] = {name: _copy(tensor) for name, tensor in model.state_dict().items()}
            tables["ema"] = {name: _copy(tensor) for name, tensor in averaged.state_dict().items()}
        return replace(state, tables=tables, plain={**state.plain, "updates": updates})

    @classmethod
    def of_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        names: Mapping[int, str],
        shapes: Mapping[str, torch.Size],
        packed: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
    ) -> "CarriedOptimizerState":
        """Copy the state of an optimizer to the CPU.

        Args:
            optimizer: any optimizer of torch's form.
            names: id of each of its parameters -> name.
            shapes: name -> shape.
            packed: the state as ``TrainEngine.state`` or ``pack_optimizer`` returns it; None: the optimizer's own.

        Raises:
            PruneError: a state is neither of its parameter's shape nor a single number.
        """
        order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        tensors, plain = tensor_files.pack_optimizer(optimizer) if packed is None else packed
        tables: dict[str, dict[str, Tensor]] = {}
        numbers = {}
        for entry, tensor in tensors.items():
            number, _, key = entry.partition(".")
            name = order[int(number)]
            if tensor.shape == shapes[name] and tensor.is_floating_point():
                tables.setdefault(OPTIMIZER + key, {})[name] = _copy(tensor)
            elif tensor.numel() == 1:
                numbers[f"{key}/{name}"] = _copy(tensor)
            else:
                raise _cannot_prune_error(optimizer, key, tensor, name, shapes[name])
        plain_state = {f"{k.partition('.')[2]}/{order[int(k.partition('.')[0])]}": v for k, v in plain["state"].items()}
        return cls(tables, numbers, {**plain, "state": plain_state})

    def for_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Convert this state for a new optimizer, which keeps its own learning rates.

        Args:
            model: the bare (pruned) model; tensors of this state have its shapes.
            optimizer: a new one of its parameters.

        Returns:
            The arguments of ``TrainEngine.load_state``.
        """
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
            pairs = ((*entry.partition("/")[::2], value) for entry, value in values.items())
            # parameters of blocks that were removed have no number
            moved[kind] = {f"{number[name]}.{key}": value for key, name, value in pairs if name in number}
        fresh = optimizer.state_dict()["param_groups"]
        groups = [{**carried, **new} for carried, new in zip(self.plain["groups"], fresh, strict=True)]
        return {**tensors, **moved["numbers"]}, {**self.plain, "state": moved["state"], "groups": groups}

    def prune(self, prune_tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> "CarriedOptimizerState":
        """Prune this state as the network is pruned.

        Args:
            prune_tensors: name -> tensor of the dense shape, to name -> tensor of the pruned shape; names are those of
                parameters and buffers (``surgeon.prune_tensors_like`` with its first arguments bound).

        Returns:
            A new state.
        """
        return replace(self, tables={name: prune_tensors(table) for name, table in self.tables.items()})

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the meta of a safetensors file, which ``from_tensors`` converts back."""
        tensors = {f"{table}/{name}": tensor for table, named in self.tables.items() for name, tensor in named.items()}
        return {**tensors, **{f"number/{entry}": value for entry, value in self.numbers.items()}}, dict(self.plain)

    @classmethod
    def from_file(cls, path: Path) -> "CarriedOptimizerState":
        """Read a file that was written from ``to_file``.

        Raises:
            PruneError: it is missing or damaged.
        """
        return cls.from_tensors(*tensor_files.read_tensors(path))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> "CarriedOptimizerState":
        """The state from the tensors and the meta that ``to_file`` returned."""
        tables: dict[str, dict[str, Tensor]] = {}
        numbers = {}
        for entry, tensor in tensors.items():
            table, _, name = entry.rpartition("/")
            if table.startswith("number/"):
                numbers[entry.removeprefix("number/")] = tensor
            else:
                tables.setdefault(table, {})[name] = tensor
        return cls(tables, numbers, plain)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimizer's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def check(settings: Training) -> None:
    """Check by one update of one layer that the state of a section's optimizer can be pruned.

    Args:
        settings: the recipe's section of the training that leaves its state.

    Raises:
        PruneError: a state is neither of its parameter's shape nor a single number.
    """
    layer = nn.Conv2d(160, 160, 3)
    optimizer = optim.create_optimizer(optim.parameter_groups(layer, settings), settings)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    for name, parameter in layer.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                raise _cannot_prune_error(optimizer, key, value, name, parameter.shape)


def _cannot_prune_error(
    optimizer: torch.optim.Optimizer, key: str, tensor: Tensor, name: str, shape: torch.Size
) -> PruneError:
    return PruneError(
        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(tensor.shape)} for {name}, which is "
        f"{tuple(shape)}: "
        "it cannot be cut along. Choose another optimizer (in a recipe finetune.optimizer: sgd, adamw), or leave its "
        "state behind (no schedule.carry_optimizer)."
    )


def rebuild_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    shapes: Mapping[str, torch.Size],
    small: nn.Module,
    prune_tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> torch.optim.Optimizer:
    """A new optimizer of a pruned network with the state of the dense network's, cut along with the weights.

    Args:
        optimizer: of the dense network.
        names: id of each of its parameters -> name.
        shapes: name -> dense shape.
        small: the pruned network.
        prune_tensors: as in ``CarriedOptimizerState.prune``.

    Returns:
        An optimizer of the same class, with the same groups.

    Raises:
        PruneError: a state is neither of its parameter's shape nor a single number.
    """
    state = CarriedOptimizerState.of_optimizer(optimizer, names, shapes).prune(prune_tensors)
    after = dict(small.named_parameters())
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        left = [names[id(parameter)] in after for parameter in group["params"]]  # others went with their block
        own: list[Any] = [after[names[id(p)]] for p, there in zip(group["params"], left, strict=True) if there]
        kept = {key: value for key, value in group.items() if key != "param_names"}
        if "param_names" in group:  # an optimizer that was made of named parameters
            names_left = [name for name, there in zip(group["param_names"], left, strict=True) if there]
            own = list(zip(names_left, own, strict=True))
        groups.append({**kept, "params": own})
    accepted = inspect.signature(type(optimizer)).parameters
    made = type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items() if key in accepted})
    tensor_files.unpack_optimizer(made, *state.for_optimizer(small, made))
    return made
