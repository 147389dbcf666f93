"""Bundles of networks without heads or head positions, of layers that a file knows under other names."""

from pathlib import Path

import pytest
import torch
from torchvision.models import VisionTransformer

import dist_prune as dp
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.export import bundle


def network(num_classes: int = 10) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=num_classes).eval()


def saved(folder: Path, units) -> tuple[torch.nn.Module, torch.Tensor]:
    model, images = network(), torch.randn(2, 3, 16, 16)
    graph = dp.trace(model, images, streams=True, units=units)
    plan = dp.select(dp.score(model, graph, "l1"), graph, keep_ratio=0.5)
    assert [name for name in plan.removed if "self_attention" in name]
    small = dp.prune(model, plan)
    dp.save(small, plan, folder)
    return small, images


@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_a_bundle_of_torchs_attention_loads(tmp_path, units):
    small, images = saved(tmp_path, units)
    loaded = dp.load(tmp_path, model=network)
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))


@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_weights_that_do_not_fit_the_units_are_refused(tmp_path, units):
    saved(tmp_path, units)
    weights, _ = tensor_files.read_tensors(tmp_path / bundle.WEIGHTS)
    name = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    weights[name] = weights[name][:-1].clone()
    model, plan = network(), bundle.read_bundle(tmp_path).plan
    with pytest.raises(PruneError, match=r"do not fit the plan: '.*self_attention\.\w+' has \d+ channels"):
        bundle.rebuild(model, plan, weights)
