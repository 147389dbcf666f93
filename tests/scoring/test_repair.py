"""Repair after the cut: its laws, against brute force, on real ranks, stopped and resumed."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_prune as dp
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.surgeon import apply_plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.repair import Repairer
from dist_prune.training.tracking import Tracker
from tests.support import tiny

COUNT = 37


def images(channels: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = next(tiny.digits_feed().batches([np.arange(COUNT)]))
    return [(found.images.expand(-1, channels, -1, -1).contiguous(), found.labels)]


class Chain(nn.Module):
    """Convolutions with and without bias, a depthwise one, a flattened linear head; no batch norm."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.third = nn.Conv2d(width, 5, 3, stride=2, bias=False)
        self.head = nn.Linear(45, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x)).flatten(1))


def chain() -> Any:
    torch.manual_seed(3)
    return Chain().double().eval()


def plan_without(graph, channels: dict[str, list[int]]) -> Plan:
    kept = {g.name: [i for i in range(g.width) if i not in channels.get(g.name, [])] for g in graph.free}
    return Plan.from_kept(graph, kept)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images()[0][0])


NETWORKS = {
    "chain": chain,
    "residual": tiny.network,
    "vit": lambda: tiny.network(name="vit_tiny_patch16_224", patch_size=4, depth=2, embed_dim=24, num_heads=3),
}


@pytest.mark.parametrize("method", ["least_squares", "bias", "fold"])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_removed_is_nothing_changed(name, method):
    model = NETWORKS[name]()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {})
    repaired: Any = dp.repair(model, dp.prune(model, plan, graph), plan, images(), graph, method=method)
    for key, tensor in model.state_dict().items():
        assert torch.allclose(repaired.state_dict()[key], tensor, atol=1e-6), key


def test_without_an_error_no_weight_changes():
    """A channel that nothing reads goes: every layer behind it is solved for, and stays as it is."""
    model = chain()
    with torch.no_grad():
        model.third.weight[:, 2] = 0
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"first": [2]})
    cut = dp.prune(model, plan, graph)
    for ridge in (None, 1e-6):
        repaired = dp.repair(model, cut, plan, images(), graph, ridge=ridge)
        for key, tensor in cut.state_dict().items():
            assert torch.allclose(repaired.state_dict()[key], tensor, atol=1e-6), key


@pytest.mark.parametrize("method", ["least_squares", "fold"])
def test_a_removed_duplicate_leaves_the_same_function(method):
    model = chain()
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight[4], layer.bias[4] = layer.weight[1].clone(), layer.bias[1].clone()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"first": [4]})
    cut = dp.prune(model, plan, graph)
    assert not torch.allclose(outputs(cut), outputs(model), atol=1e-2)
    options: dict[str, Any] = {"ridge": 1e-10} if method == "least_squares" else {}
    repaired = dp.repair(model, cut, plan, images(), graph, method=method, **options)
    assert torch.allclose(outputs(repaired), outputs(model), atol=1e-5)


def test_least_squares_is_what_lstsq_finds():
    model = chain()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"first": [0, 3]})
    cut = dp.prune(model, plan, graph)
    repaired: Any = dp.repair(model, cut, plan, images(), graph, ridge=1e-12)
    x = images()[0][0]
    with torch.no_grad():  # the third layer, from the inputs that the repaired layers before it give
        after = torch.relu(repaired.second(torch.relu(repaired.first(x))))
        dense = model.third(torch.relu(model.second(torch.relu(model.first(x)))))
    patches = nn.functional.unfold(after, 3, stride=2).transpose(1, 2).reshape(-1, 4 * 9)
    wanted = dense.flatten(2).transpose(1, 2).reshape(-1, 5)
    best = torch.linalg.lstsq(patches, wanted, driver="gelsd").solution
    own = repaired.third.weight.detach().flatten(1).T
    assert (patches @ own - wanted).square().mean() < (patches @ best - wanted).square().mean() * (1 + 1e-6) + 1e-12
    assert torch.allclose(patches @ own, patches @ best, atol=1e-6)


def test_depthwise_layers_are_repaired_by_their_taps():
    """Each channel's own nine weights and bias, from that channel alone."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(),
        nn.Linear(64, 10),
    ).double().eval()  # fmt: skip
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"0": [1, 2, 3]})
    repaired: Any = dp.repair(model, dp.prune(model, plan, graph), plan, images(), graph, ridge=1e-12)
    x = images()[0][0]
    with torch.no_grad():
        after, wanted = repaired[:4](x), model[:5](x)
    for channel in range(4):
        patches = nn.functional.unfold(after[:, channel : channel + 1], 3).transpose(1, 2).reshape(-1, 9)
        full = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
        own = torch.cat([repaired[4].weight[channel].flatten(), repaired[4].bias[channel : channel + 1]]).detach()
        best = torch.linalg.lstsq(full, wanted[:, channel].flatten()[:, None], driver="gelsd").solution[:, 0]
        assert torch.allclose(full @ own, full @ best, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_repair_is_nearer_to_the_dense_network(name):
    model = NETWORKS[name]()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {g.name: list(range(g.width // 3)) for g in graph.free})
    cut = dp.prune(model, plan, graph)
    miss = {"none": float((outputs(cut) - outputs(model)).square().mean())}
    for method in ("bias", "least_squares"):
        repaired = dp.repair(model, cut, plan, images(), graph, method=method)
        miss[method] = float((outputs(repaired) - outputs(model)).square().mean())
    assert miss["least_squares"] < 0.5 * miss["none"]
    assert miss["least_squares"] < miss["bias"]


def test_memory_does_not_change_the_result():
    """With no memory, the steps from the images on are repeated for each layer."""
    model = tiny.network()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {g.name: [0] for g in graph.free})
    cut = dp.prune(model, plan, graph)
    held = dp.repair(model, cut, plan, images(), graph)
    again = dp.repair(model, cut, plan, images(), graph, memory_mb=0)
    for key, tensor in held.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_wide_layers_are_solved_in_blocks(monkeypatch):
    model = chain()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"first": [0, 3]})
    cut = dp.prune(model, plan, graph)
    monkeypatch.setattr("dist_prune.pruning.repair.repaired_layers.MOST_COLUMNS", 18)
    repaired = dp.repair(model, cut, plan, images(), graph)
    before, after = (float((outputs(m) - outputs(model)).square().mean()) for m in (cut, repaired))
    assert after < 0.5 * before


def repaired_weights(ranks: Communicator, method: Any) -> dict[str, bytes]:
    model = tiny.network()
    graph = trace_groups(model, tiny.example()[:1])
    plan = plan_without(graph, {g.name: [0, 2] for g in graph.free})
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    Repairer(tiny.digits_feed(), np.arange(COUNT), ranks, Tracker(False), method, micro_batch=5).run(
        model, small, graph, plan
    )
    return {name: tensor.numpy().tobytes() for name, tensor in small.state_dict().items()}


@pytest.mark.parametrize("method", ["norms", "bias", "fold", "least_squares"])
def test_the_same_bits_for_every_world(method, pool):
    one = repaired_weights(Communicator(), method)
    for world in (2, 3):
        for found in pool.run(world, repaired_weights, method):
            assert found == one


def test_a_stopped_repair_resumes_at_its_layer(tmp_path, monkeypatch):
    model = tiny.network()
    graph = trace_groups(model, tiny.example()[:1])
    plan = plan_without(graph, {g.name: [0, 2] for g in graph.free})

    def repair(small: nn.Module) -> Any:
        said: list[str] = []
        tracker = Tracker(False)
        monkeypatch.setattr(tracker, "info", said.append)
        own: Any = Repairer(tiny.digits_feed(), np.arange(COUNT), Communicator(), tracker, micro_batch=5, identity="a")
        own.file = tmp_path / "repair.safetensors"
        own.lines = own.run(model, small, graph, plan)
        own.said = said
        return own

    cut = copy.deepcopy(model)
    apply_plan(cut, graph, plan)
    count, plain = [0], preemption.poll

    def stop(comm: Communicator):
        count[0] += 1
        if count[0] == 3:
            return (True, *plain(comm)[1:])
        return plain(comm)

    with monkeypatch.context() as patch:
        patch.setattr(preemption, "poll", stop)
        with pytest.raises(preemption.PreemptedError, match="while repairing, after 3 of"):
            repair(copy.deepcopy(cut))
    resumed, whole = copy.deepcopy(cut), copy.deepcopy(cut)
    second = repair(resumed)
    assert any("resumes after 3 of" in line for line in second.said)
    (tmp_path / "repair.safetensors").unlink()
    assert repair(whole).lines == second.lines
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_bad_arguments_are_refused():
    model = chain()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"first": [1]})
    small = dp.prune(model, plan, graph)
    with pytest.raises(PruneError, match="least_squares"):
        dp.repair(model, small, plan, images(), graph, method="least_square")  # type: ignore[arg-type]
    overflow = [(images()[0][0] * 1e12, images()[0][1])]
    with pytest.raises(PruneError, match="overflows on these images"):
        dp.repair(model, small, plan, overflow, graph)
    with pytest.raises(PruneError, match="pruned by this plan"):
        dp.repair(model, model, plan, images(), graph)
