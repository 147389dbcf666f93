"""Fisher scores against autograd on a mask, one image at a time; the batch-mean form."""

import numpy as np
import torch
from torch.nn import functional

from dist_prune import models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.methods import fisher
from dist_prune.pruning.hooks.gating import gate, gate_points
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.tracking import Tracker
from tests.support import tiny


def by_masks(bench, group: str) -> torch.Tensor:
    """(n, C): the gradient of each image's loss for a mask of ones on the group's channels."""
    points, rows = gate_points(bench.graph, group), []
    for batch in bench.loader.batches([bench.ids[i : i + 1] for i in range(bench.images)]):
        mask = torch.ones(bench.graph.group(group).width, dtype=torch.float64, requires_grad=True)
        with gate(bench.model, points, {group: mask}):
            loss = functional.cross_entropy(bench.model(batch.images), batch.labels)
        rows.append(torch.autograd.grad(loss, [mask])[0])
    return torch.stack(rows)


def test_scores_are_half_the_mean_square_of_mask_gradients():
    """A residual stream's mask is read at several layers: their gradients add up before they are squared."""
    bench = tiny.bench(tiny.network())
    scores = fisher.Fisher(fisher.Options()).score(bench)
    for group in ("conv1", "layer1.0.conv1", "layer3.0.downsample.0"):
        expected = (by_masks(bench, group) ** 2).mean(0) / 2
        assert torch.allclose(scores[group], expected, rtol=1e-5), group


def test_the_released_batch_mean():
    rows = torch.tensor([[2.0], [4.0], [6.0]], dtype=torch.float64)
    expected = 0.5 * ((2 / 2) ** 2 + (4 / 2) ** 2) / 2 + 0.5 * 6**2
    assert float(fisher.batch_mean(rows, 2)) == expected
    bench = tiny.bench(tiny.network())
    plain, released = (
        fisher.Fisher(fisher.Options(quirks=quirks, batch=53)).score(bench)  # type: ignore[arg-type]
        for quirks in ((), ("batch_mean",))
    )
    assert torch.allclose(released["conv1"], plain["conv1"] / 53**2), "one whole batch: the same ranking"
    trained = fisher.Fisher(fisher.Options(fidelity="as_released", batch=53)).score(tiny.bench(tiny.network()))
    assert not torch.allclose(trained["conv1"], released["conv1"])


def lenet_bench():
    """LeNet-5 on 28x28 images made of digits, in double precision."""
    torch.manual_seed(0)
    model = models.create("lenet5_mnist", 10, 1).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.5)
    source = open_source("digits", None, "", True)
    feed = ImageLoader(source, TransformConfig(28, (0.3,), (0.4,)), torch.device("cpu"), 0, torch.float64)
    channels = trace_groups(model, tiny.example(size=28)[:1])
    return DistributedScoringContext(
        model, channels, feed, np.arange(12), tiny.machine(), Tracker(False), 6, 0, None, "test", 1
    )


def test_the_released_program_scores_lenet_before_its_norms():
    """Behind pool and ReLU, the norm not passed; by autograd on a mask there. Linear layers as everywhere."""
    bench = lenet_bench()
    plain, before = (
        fisher.Fisher(fisher.Options(quirks=quirks)).score(lenet_bench())  # type: ignore[arg-type]
        for quirks in ((), ("before_norm",))
    )
    rows = []
    for batch in bench.loader.batches([bench.ids[i : i + 1] for i in range(bench.images)]):
        mask = torch.ones(1, 20, 1, 1, dtype=torch.float64, requires_grad=True)
        handle = bench.model.get_submodule("bn2").register_forward_pre_hook(lambda _m, x, m=mask: (x[0] * m,))
        loss = functional.cross_entropy(bench.model(batch.images), batch.labels)
        handle.remove()
        rows.append(torch.autograd.grad(loss, [mask])[0].flatten())
    assert torch.allclose(before["conv2"], (torch.stack(rows) ** 2).mean(0) / 2, rtol=1e-5)
    assert not torch.allclose(before["conv2"], plain["conv2"], rtol=0.1)
    assert torch.equal(before["fc1"], plain["fc1"])
    assert fisher.Fisher(fisher.Options(fidelity="as_released")).has("before_norm")
    other = tiny.bench(tiny.network())
    assert fisher.before_norm(other.graph) == {}, "norms behind the layers themselves are passed"
