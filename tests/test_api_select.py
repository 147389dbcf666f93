"""The library's targets and figures of time."""

import pytest
import torch
import torchvision
from torch import nn

import dist_prune as dp
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.pruning.plan.plan import Plan
from dist_prune.scoring import network_times
from tests.test_api import SIDE, network

SHAPE = (3, SIDE, SIDE)


def clock(monkeypatch, reliable: bool = True, fixed: float = 0.3) -> None:
    """A machine whose times are written down: a fixed share, and the rest by the number of weights."""

    def latency(models, shape, batches, repeats, device, threads, timer=None, rounds=3):
        assert shape == SHAPE
        size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        times = {name: fixed + (1 - fixed) * size[name] / size[""] for name in models}
        return {
            n: {str(b): {"ms": ms, "ms_best": ms, "reliable": reliable} for b in batches} for n, ms in times.items()
        }

    monkeypatch.setattr(network_times, "measure_latency", latency)


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_share_of_the_time_is_a_target(monkeypatch):
    clock(monkeypatch)
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = dp.trace(model, SHAPE)
    scores = dp.score(model, graph, "l1")
    plan = dp.select(scores, graph, target={"latency": 0.6, "latency_tolerance": 0.1}, model=model)
    small = dp.prune(model, plan)
    assert 0.3 + 0.7 * weights(small) / weights(model) == pytest.approx(0.6, rel=0.1)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_target_of_time_needs(monkeypatch):
    clock(monkeypatch)
    model = network()
    graph = dp.trace(model, SHAPE)
    scores = dp.score(model, graph, "l1")
    with pytest.raises(PruneError, match="0.2 cannot be reached on this device"):
        dp.select(scores, graph, target={"latency": 0.2}, model=model)
    with pytest.raises(PruneError, match="another network"):
        dp.select(scores, graph, target={"latency": 0.6}, model=nn.Sequential(nn.Conv2d(3, 4, 1)))
    clock(monkeypatch, reliable=False)
    with pytest.raises(PruneError, match="not reliable: other work used the machine"):
        dp.select(scores, graph, target={"latency": 0.6}, model=model)


def test_times_of_networks_are_measured_in_turns():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 96, 5), nn.Conv2d(96, 96, 5))

        def forward(self, images):
            return self.layers(images)

    models = {"slow": Slow().train(), "quick": nn.Conv2d(3, 2, 1)}
    times = dp.latency(models, torch.zeros(1, 3, 40, 40), batch=2, repeats=5, threads=1)
    assert times["slow"]["ms"] > times["quick"]["ms"] > 0
    assert times["slow"]["images_per_s"] == pytest.approx(2000 / times["slow"]["ms"])
    assert models["slow"].training
    with pytest.raises(PruneError, match="no device"):
        dp.latency({}, SHAPE)


def plan_by_time(ranks) -> Plan:
    """Each rank has a clock of its own: the first one's counts."""
    patch = pytest.MonkeyPatch()
    clock(patch, fixed=0.3 if ranks.rank == 0 else 0.59)
    try:
        model = network()
        graph = dp.trace(model, SHAPE)
        scores = dp.score(model, graph, "l1", group=ranks.group)
        target = {"latency": 0.6, "latency_tolerance": 0.2}
        return dp.select(scores, graph, target=target, model=model, group=ranks.group)
    finally:
        patch.undo()


def test_ranks_take_the_times_of_the_first(pool):
    one, other = pool.run(2, plan_by_time)
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint == plan_by_time(Communicator()).fingerprint


def test_blocks_go_by_time(monkeypatch):
    """Times of single blocks are measured beside those of groups, and the search takes them."""
    clock(monkeypatch)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).eval()
    graph = dp.trace(model, SHAPE, depth=True)
    images = [(torch.randn(4, *SHAPE), torch.arange(4))]
    scores = dp.score(model, graph, "l1", images)
    assert [block.path for block in graph.blocks] == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    target = {"latency": 0.6, "latency_tolerance": 0.1}
    plan = dp.select(scores, graph, target=target, depth=True, model=model)
    assert plan.blocks_removed and plan.removed
    small = dp.prune(model, plan)
    assert 0.3 + 0.7 * weights(small) / weights(model) == pytest.approx(0.6, rel=0.1)
    assert dp.costs(graph, plan)["params"] == weights(small)
    only = dp.select(scores, graph, target={"macs": 0.7}, depth="only")
    assert only.blocks_removed and not only.removed
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images[0][0]).sum().backward()
    sgd.step()
    adam = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    adam.step()
    small = dp.prune(model, only)
    assert all(len(dp.carry(one, only).state) == len(list(small.parameters())) for one in (sgd, adam))
    with pytest.raises(PruneError, match="no residual block"):
        dp.select(scores, dp.trace(model, SHAPE), target={"macs": 0.7}, depth=True)
    with pytest.raises(PruneError, match="score it with images"):
        dp.select(dp.score(model, graph, "l1"), graph, target={"macs": 0.7}, depth=True)
    similar = dp.score(model, graph, "graph", images)
    with pytest.raises(PruneError, match="select.depth: blocks are ranked beside channels"):
        dp.select(similar, graph, threshold=0.5, depth=True)
    with pytest.raises(PruneError, match="search chooses among channels alone"):
        dp.search(model, scores, graph, images, target={"macs": 0.7}, depth=True)


def test_a_plan_of_blocks_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).eval()
    graph = dp.trace(model, SHAPE, depth=True)
    scores = dp.score(model, graph, "l1", [(torch.randn(4, *SHAPE), torch.arange(4))])
    plan = dp.select(scores, graph, keep_ratio=0.6, depth=True)
    small = dp.prune(model, plan)
    assert dp.prune_(model, plan) is model
    dp.save(small, plan, tmp_path)
    loaded = dp.load(tmp_path, model=lambda: torchvision.models.resnet18(num_classes=4)).eval()
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))
        assert torch.equal(model(images), small(images))
