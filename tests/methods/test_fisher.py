"""Fisher scores against autograd on a mask, one image at a time; the batch-mean form."""

import torch
from torch.nn import functional

from dist_prune.methods import fisher
from dist_prune.pruning.switches import places, switched
from tests import tiny


def by_masks(bench, group: str) -> torch.Tensor:
    """(n, C): the gradient of each image's loss for a mask of ones on the group's channels."""
    spots, rows = places(bench.channels, group), []
    for batch in bench.feed.batches([bench.ids[i : i + 1] for i in range(bench.images)]):
        mask = torch.ones(bench.channels.group(group).width, dtype=torch.float64, requires_grad=True)
        with switched(bench.model, [(spots, lambda m=mask: m)]):
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
