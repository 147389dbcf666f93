"""Scores and plans on a GPU are those of a CPU."""

import json

import pytest
import torch

from dist_prune import methods
from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.gpu.support import bench_on
from tests.support import tiny
from tests.test_golden import FILE, NETWORKS

pytestmark = pytest.mark.gpu
HALF = SelectionRequest(target=("macs", 0.6))


def plan_on(ranks: Communicator | None, name: str, label: str, device: torch.device) -> str:
    bench = bench_on(device, tiny.network(**NETWORKS[label]), ranks)
    method = tiny.method(name)
    return method.select(method.score(bench), bench.graph, HALF).fingerprint


@pytest.mark.parametrize("label", NETWORKS)
@pytest.mark.parametrize("name", methods.list_names())
def test_the_golden_plans_are_the_cpus(name, label, gpu):
    assert plan_on(None, name, label, gpu) == json.loads(FILE.read_text())[f"{name} on {label}"]


@pytest.mark.parametrize("name", methods.list_names())
def test_two_ranks_on_one_gpu_give_the_plan_of_one(name, gpu, pair):
    golden = json.loads(FILE.read_text())[f"{name} on resnet8p_cifar"]
    assert set(pair.run(2, plan_on, name, "resnet8p_cifar", gpu)) == {golden}


@pytest.mark.parametrize("name", methods.list_names())
def test_scoring_leaves_the_network_as_it_was(name, gpu):
    model = tiny.network().to(gpu)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    method = tiny.method(name)
    method.score(bench_on(gpu, model))
    if not method.trains_weights:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", methods.list_names())
def test_the_same_scores_twice(name, gpu):
    """In float32, where a sum in another order would show."""
    found = []
    for _ in range(2):
        method = tiny.method(name)
        found.append(method.score(bench_on(gpu, tiny.network().float(), dtype=torch.float32)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
