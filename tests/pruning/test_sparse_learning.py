"""Sparse training: the terms against autograd of the penalties, and what they do to a network that trains."""

import pytest
import torch

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.sparse_learning import sparsity_gradient
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.run import run
from tests.support import tiny


def added(kind: str, weight: float = 0.1):
    model = tiny.network()
    channels = trace_groups(model, tiny.example()[:1])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    sparsity_gradient(kind, model, channels, weight)()
    return model, channels, {name: parameter.grad - 1 for name, parameter in model.named_parameters()}


def test_scales_get_their_sign():
    model, _, terms = added("bn_scale")
    loss = 0.1 * sum(p.abs().sum() for n, p in model.named_parameters() if "bn" in n and n.endswith("weight"))
    loss = loss + 0.1 * sum(model.get_submodule(f"layer{i}.0.downsample.1").weight.abs().sum() for i in (2, 3))  # type: ignore
    named = dict(model.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    for name, grad in grads.items():
        assert torch.allclose(terms[name], torch.zeros_like(terms[name]) if grad is None else grad), name


def test_group_norm_is_half_the_gradient_of_the_weighted_squares():
    model, channels, terms = added("group_norm")
    named, scored = dict(model.named_parameters()), tiny.method("group_norm").score(tiny.bench(model))
    loss = torch.zeros((), dtype=torch.float64)
    for group in channels.free:
        sizes = scored[group.name]
        factor = 2 ** (4 * (sizes.max() - sizes) / (sizes.max() - sizes.min()))
        assert (factor.min(), factor.max()) == (1, 16)
        for coupling in group.couplings:
            layer = channels.layers[coupling.layer]
            if layer.kind == "pool":
                continue
            weight = named[f"{layer.name}.weight"]
            side = weight.transpose(0, 1) if coupling.side == "in" else weight
            loss = loss + (factor * side.reshape(group.width, -1).square().sum(1)).sum() / 2
    grads = torch.autograd.grad(0.1 * loss, list(named.values()), allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        assert torch.allclose(terms[name], torch.zeros_like(terms[name]) if grad is None else grad), name


@pytest.mark.parametrize("kind", ["bn_scale", "group_norm"])
def test_training_with_it_leaves_less_in_the_channels(kind, tmp_path):
    """From the same checkpoint, the same images in the same order."""
    words = [
        "backbone.name=resnet8p_cifar", "train.epochs=2", "train.images=200", "train.selection=last", "train.lr=0.02",
        "report.trackers=[]", "method.name=l1", "score.compare=[l1,random]",
    ]  # fmt: skip

    def trained(name: str, *more: str) -> dict[str, torch.Tensor]:
        run(
            loading.load("quickstart", [*words, *more], methods.options_of),
            tmp_path / name,
            DistributedEnvironment.single_process(),
            until="train",
        )
        return tensor_files.read_tensors(tmp_path / name / "dense.safetensors")[0]

    trained("start")
    file = f"backbone.checkpoint={tmp_path / 'start/dense.safetensors'}"
    asked = (file, f"train.sparsity={kind}")
    weak, strong = (
        trained("weak", *asked, "train.sparsity_weight=1e-9"),
        trained("strong", *asked, "train.sparsity_weight=2"),
    )
    scales = [name for name in weak if "bn" in name and name.endswith(".weight")]
    total = [sum(float(state[name].abs().sum()) for name in scales) for state in (weak, strong)]
    assert total[1] < 0.9 * total[0]
    kept = trained("kept", file, f"train.sparsity={kind}", "train.epochs=0")
    start = tensor_files.read_tensors(tmp_path / "start/dense.safetensors")[0]
    assert all(torch.equal(kept[name], start[name]) for name in start), "without epochs a checkpoint is taken as it is"
    assert not torch.equal(weak["conv1.weight"], start["conv1.weight"])
