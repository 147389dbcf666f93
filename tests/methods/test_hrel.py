"""HRel against its definition written out in numpy, against the criterion of `entropy`, and on a dead filter."""

import numpy as np
import pytest
import torch

from dist_prune import methods
from dist_prune.methods.hrel import HRel, Options
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.support import tiny

GROUP, READER = "layer2.0.conv1", "layer2.0.conv2"
STREAM, READERS = "layer2.0.downsample.0", ("layer3.0.conv1", "layer3.0.downsample.0")


def entropy(kernel: np.ndarray) -> float:
    values = np.clip(np.linalg.eigvalsh(kernel / np.trace(kernel)), 1e-300, None)
    return float(-(values * np.log2(values)).sum())


def aligned(squared: np.ndarray, anchor: np.ndarray) -> float:
    """The first best of 300 widths from 0.3 to 10 mean distances."""
    grid = np.linspace(0.3, max(0.3, 10 * np.sqrt(squared).mean()), 300)
    kernels = [np.exp(-squared / sigma**2) for sigma in grid]
    scores = [(k * anchor).sum() / np.linalg.norm(k) / np.linalg.norm(anchor) for k in kernels]
    return float(grid[int(np.argmax(np.round(scores, 12)))])


def relevance(maps: np.ndarray, labels: np.ndarray, batches: list[np.ndarray]) -> float:
    """I(Z; Y) of one filter's maps (n, d), the mean over batches, written as the definition says."""
    kernels, state = [], 0.0
    for number, batch in enumerate(batches):
        squared = ((maps[batch][:, None] - maps[batch][None]) ** 2).sum(2)
        onehot = np.eye(10)[labels[batch]]
        label = np.exp(-((onehot[:, None] - onehot[None]) ** 2).sum(2) / (2 * 0.1**2))
        found = aligned(squared, label)
        state = found if number == 0 else 0.9 * state + 0.1 * found
        kernels.append((squared, label))
    whole = 0.0
    for squared, label in kernels:
        kernel = np.exp(-squared / state**2)
        whole += entropy(kernel) + entropy(label) - entropy(kernel * label)
    return whole / len(batches)


def maps_at(bench, layer: str) -> np.ndarray:
    seen = []
    handle = bench.model.get_submodule(layer).register_forward_pre_hook(lambda module, x: seen.append(x[0].clone()))
    with torch.no_grad():
        (part,) = bench.loader.batches([bench.ids])
        bench.model(part.images)
    handle.remove()
    return seen[0].flatten(2).float().double().numpy()


def test_the_definition():
    bench = tiny.bench(tiny.network())
    order = torch.randperm(tiny.IMAGES, generator=bench.generator("hrel", "batches")).numpy()
    batches, labels = [order[:20], order[20:40]], bench.labels.numpy()
    scores = HRel(Options(batch=20)).score(bench)
    maps = maps_at(bench, READER)
    for k in (0, 3, 17):
        assert float(scores[GROUP][k]) == pytest.approx(relevance(maps[:, k], labels, batches), abs=2e-6)
    inputs = [maps_at(bench, reader) for reader in READERS]
    assert np.array_equal(inputs[0], inputs[1]), "both read the same sum: it counts once"
    for k in (1, 20):
        assert float(scores[STREAM][k]) == pytest.approx(relevance(inputs[0][:, k], labels, batches), abs=2e-6)


def test_the_static_criterion_of_the_ranking_paper_agrees():
    """One batch of all images, the same order of the entropy: least relevant first."""
    bench = tiny.bench(tiny.network())
    entropies = methods.find("entropy")
    words = {"criterion": "relevance", "width": "label", "alpha": 1.0, "batch": tiny.IMAGES, "skip_zero": None}
    other = entropies(entropies.Options.model_validate(words))
    orders = other.orders(other.score(bench), bench.graph, SelectionRequest())
    own = HRel(Options(batch=tiny.IMAGES)).score(bench)
    for group in bench.graph.free:
        if len(group.producers) == 1:
            assert np.all(np.diff(own[group.name][orders[group.name]].numpy()) >= 0)


def test_a_dead_filter_says_nothing_and_goes_first():
    model = tiny.network()
    norm = model.get_submodule("layer2.0.bn1")
    with torch.no_grad():
        for tensor in norm.parameters():
            tensor[5] = 0.0
    bench = tiny.bench(model)
    method = HRel(Options())
    scores = method.score(bench)
    assert float(scores[GROUP][5]) == pytest.approx(0, abs=1e-6)
    plan = method.select(scores, bench.graph, SelectionRequest(counts={GROUP: 31}))
    assert plan.removed == {GROUP: (5,)}
