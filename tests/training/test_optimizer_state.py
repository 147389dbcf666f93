"""Optimizer state and averaged weights go through surgery: cut as the weights are, and going on as if never stopped."""

import copy
from functools import partial

import pytest
import torch

from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.training.optimizer_state import OPTIMIZER, CarriedOptimizerState
from dist_prune.training.trainer import Trainer
from tests.support import tiny
from tests.training.test_training import Killed, kill_after, trainer

CASES = {
    "sgd": {},
    "nesterov": {"nesterov": True, "ema": 0.9, "mixup": 0.2, "clip_grad": 1.0, "accumulate": 2},
    "adamw": {"optimizer": "adamw", "lr": 0.003, "ema": 0.99},
    "lamb": {"optimizer": "lamb", "lr": 0.003},  # it counts its steps in the groups of parameters
}


def ended(carried: CarriedOptimizerState | None = None, first: int = 0, start=None, **more) -> Trainer:
    """A finished training at a constant rate that tells what it leaves."""
    found = trainer(schedule="constant", **more)
    if start is not None:
        found.model = copy.deepcopy(start)
    found.keep_state, found.carried, found.loop.first_epoch = True, carried, first
    found.run()
    return found


def written(carried: CarriedOptimizerState, folder) -> CarriedOptimizerState:
    """Through a file and back."""
    tensor_files.save_tensors(folder / "state.safetensors", *carried.to_file())
    return CarriedOptimizerState.from_file(folder / "state.safetensors")


def same(one: CarriedOptimizerState, other: CarriedOptimizerState) -> None:
    assert one.tables.keys() == other.tables.keys()
    for name, table in one.tables.items():
        assert table.keys() == other.tables[name].keys()
        for key, tensor in table.items():
            assert torch.equal(tensor, other.tables[name][key]), (name, key)
    assert one.numbers.keys() == other.numbers.keys()
    assert all(torch.equal(value, other.numbers[key]) for key, value in one.numbers.items())


@pytest.mark.parametrize("case", CASES)
def test_with_nothing_removed_it_was_never_stopped(case, tmp_path):
    """Two epochs, or one, a plan that removes nothing, and another one: the same bits."""
    more = CASES[case]
    whole = ended(epochs=2, **more)
    half = ended(epochs=1, **more)
    assert half.final_state is not None
    assert whole.final_state is not None
    model, x = half.model, tiny.example()
    channels = trace_groups(model, x[:1])
    nothing = Plan({}, {group.name: group.width for group in channels.groups})
    carried = written(half.final_state, tmp_path).prune(partial(surgeon.prune_tensors_like, model, channels, nothing))
    start = copy.deepcopy(model)
    start.load_state_dict(carried.tables.get("model", model.state_dict()))
    again = ended(carried, 1, start, epochs=1, **more)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.final_state is not None
    same(whole.final_state, again.final_state)
    fresh = ended(None, 1, start, epochs=1, **more)
    assert not torch.equal(fresh.model.get_parameter("conv1.weight"), again.model.get_parameter("conv1.weight"))


@pytest.mark.parametrize("case", CASES)
def test_the_state_of_kept_channels_is_untouched(case):
    """Every tensor against its own rows and columns, by positions and not by the operation that cuts."""
    found = ended(epochs=1, **CASES[case])
    assert found.final_state is not None
    model, x = found.model, tiny.example()
    channels = trace_groups(model, x[:1])
    kept = {"conv1": [0, 2, 3, 11], "layer2.0.conv1": list(range(5, 30)), "layer3.0.conv2": [1, 2, 40, 63]}
    plan = Plan.from_kept(channels, kept)
    carried, places = (
        found.final_state.prune(partial(surgeon.prune_tensors_like, model, channels, plan)),
        remaining_positions(channels, plan.removed),
    )
    small, tables = tiny.cut(model, channels, plan), 0
    for table, named in carried.tables.items():
        for name, tensor in named.items():
            whole, layer = found.final_state.tables[table][name], name.rpartition(".")[0]
            if whole.dim():
                whole = whole[places[layer, "out"]]
            if whole.dim() > 1:
                whole = whole[:, places[layer, "in"]]
            assert torch.equal(tensor, whole), (table, name)
            tables += tensor.shape != found.final_state.tables[table][name].shape
        if table.startswith(OPTIMIZER):
            assert {n: p.shape for n, p in small.named_parameters()} == {n: t.shape for n, t in named.items()}
    assert tables > 10
    if found.ema is not None:
        cut = tiny.cut(found.ema.module, channels, plan).state_dict()
        assert cut.keys() == carried.tables["ema"].keys()
        assert all(torch.equal(tensor, carried.tables["ema"][name]) for name, tensor in cut.items())
    small.load_state_dict(carried.tables.get("model", small.state_dict()))
    ended(carried, 1, small, epochs=1, **CASES[case])  # and the small network trains with it


def test_the_state_is_that_of_the_kept_epoch_also_when_it_was_killed_behind_it(tmp_path):
    """The second of three epochs is the best: what is left is its state, whoever trained the third."""

    def judged(calls: list[int]):
        def judge(model) -> dict[str, float]:
            calls.append(1)
            return {"top1": {2: 90.0}.get(len(calls), 50.0)}

        return judge

    more = {"epochs": 3, "selection": "test", "ema": 0.9, "schedule": "constant"}
    whole = trainer(judge=judged([]), **more)
    whole.keep_state = True
    whole.run()
    two = ended(epochs=2, ema=0.9)
    assert whole.final_state is not None
    assert two.final_state is not None
    same(whole.final_state, two.final_state)
    calls: list[int] = []
    cut = trainer(folder=tmp_path, judge=judged(calls), **more)
    cut.keep_state = True
    kill_after(cut, 2 * cut.loop.steps_per_epoch + 2)
    with pytest.raises(Killed):
        cut.run()
    assert cut.checkpoints is not None
    cut.checkpoints.wait()
    again = trainer(folder=tmp_path, judge=judged(calls), **more)
    again.keep_state = True
    again.run()
    assert again.resumed == {"epoch": 2, "step": 0}
    assert again.final_state is not None
    same(whole.final_state, again.final_state)


def test_a_state_that_has_no_channels_is_refused():
    with pytest.raises(PruneError, match=r"keeps 'exp_avg_sq_row' of shape .* it cannot be cut along"):
        ended(epochs=1, optimizer="adafactor", lr=0.003)
