"""The redundancy graph against its specification: hash bits, Hamming distances, decomposition, thresholds."""

import numpy as np
import pytest
import torch
from scipy.fft import dct

from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.graph.kcore import decompose
from dist_prune.methods.graph.method import HashAgreement, edges, hash_bits
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.statistics import Accumulator
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.support import tiny


def graph(edges: list[tuple[int, int]], nodes: int) -> np.ndarray:
    table = np.zeros((nodes, nodes), dtype=bool)
    for a, b in edges:
        table[a, b] = table[b, a] = True
    return table


K4 = [(a, b) for a in range(4) for b in range(a)]
TRIANGLES = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
STAR = [(0, leaf) for leaf in range(1, 5)]


@pytest.mark.parametrize(
    ("links", "worth", "kept"),
    [
        ([*K4, (3, 4), (4, 5), (5, 6)], [1, 2, 3, 4, 5, 6, 7, 8], [6, 7]),
        ([*K4, (3, 4), (4, 5), (5, 6)], [4, 3, 2, 1, 5, 6, 7, 8], [0, 6, 7]),
        (STAR, [5, 1, 2, 3, 4], [0]),
        (STAR, [1, 5, 4, 3, 2], [1]),
        ([*TRIANGLES, (2, 3), (5, 6)], [1, 2, 3, 3.5, 2.5, 1.5, 9], [3, 6]),
        ([(i, i + 1) for i in range(5)], [1, 2, 3, 4, 5, 6], [5]),
    ],
)
def test_decomposition_vectors(links, worth, kept):
    assert decompose(graph(links, len(worth)), np.array(worth, dtype=float)) == kept


def bits_of(maps: torch.Tensor) -> str:
    side = min(8, maps.shape[-1])
    rows = hash_bits(maps[None, None].double(), 8)[0, 0].view(side, side).int().tolist()
    return "/".join("".join(map(str, row)) for row in rows)


def test_hash_vectors():
    i, j = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    zero, one = "00000000", "10000000"
    assert bits_of(torch.zeros(8, 8)) == "/".join(["11111111"] * 8)
    assert bits_of(torch.ones(8, 8)) == "/".join([one, *[zero] * 7])
    assert bits_of(-torch.ones(8, 8)) == "/".join(["01111111", *["11111111"] * 7])
    assert bits_of(i[:8, :8]) == "/".join([one, *[zero] * 7])
    assert bits_of(torch.tensor([[1.0, 2.0], [3.0, 5.0]])) == "10/00"
    assert bits_of((4 * i[:4, :4] + j[:4, :4]) ** 2 - 60) == "1011/0111/1111/0111"
    expected = [zero, "01010100", zero, "01000000", zero, "01000000", zero, zero]
    assert bits_of((i - 7.5) * (j - 7.5)) == "/".join(expected)


@pytest.mark.parametrize("shape", [(32, 32), (7, 7), (5, 12), (2, 2), (1, 1)])
def test_hash_is_the_unnormalised_dct_corner(shape):
    maps = torch.randn(3, 4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = dct(dct(maps.numpy(), type=2, axis=2), type=2, axis=3)[:, :, : min(8, shape[0]), : min(8, shape[1])]
    expected = spectrum >= spectrum.mean((2, 3), keepdims=True)
    assert np.array_equal(hash_bits(maps, 8).numpy(), expected.reshape(3, 4, -1))


@pytest.mark.parametrize("batches", [[100], [7] * 14 + [2], [1] * 100, [50, 13, 37]])
def test_hamming_from_the_gram_matrix_is_brute_force(batches):
    """Any cutting of the images gives the integers that pairwise comparison gives."""
    maps = torch.randn(100, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    point = HookPoint("conv", "conv", 6, "conv", True)
    accumulator = Accumulator(HashAgreement(8), [point], 100, torch.device("cpu"))
    start = 0
    for size in batches:
        accumulator.update(point, maps[start : start + size], torch.arange(start, start + size))
        start += size
    gram = accumulator.tables["conv"]["gram"]
    ones = gram.diagonal()
    bits = hash_bits(maps, 8)
    for a in range(6):
        for b in range(6):
            assert int(ones[a] + ones[b] - 2 * gram[a, b]) == int((bits[:, a] != bits[:, b]).sum())
    assert int(accumulator.tables["conv"]["images"]) == 100
    assert int(accumulator.tables["conv"]["bits"]) == 64


def test_the_tables_do_not_grow_with_the_images():
    """A layer's statistic is C x C integers, whether 100 images stream by or the whole training set."""
    point = HookPoint("conv", "conv", 32, "conv", True)
    sizes = []
    for images in (100, 50_000):
        accumulator = Accumulator(HashAgreement(8), [point], images, torch.device("cpu"))
        accumulator.update(point, torch.randn(7, 32, 9, 9), torch.arange(7))
        sizes.append(sum(table.numel() for table in accumulator.state_dict().values()))
    assert sizes == [32 * 32 + 2] * 2


def hamming_of(ranks: Communicator, micro_batch: int) -> dict[str, list]:
    context = tiny.bench(tiny.network(), ranks, micro_batch=micro_batch)
    scores = tiny.method("graph").score(context)
    return {name: table.tolist() for name, table in scores.items() if not name.endswith(":l1")}


def test_shards_and_batch_sizes_do_not_move_an_integer(pool):
    """Specification, section 12.3: 53 images over 1, 2 and 3 ranks, in batches of 1, 7 and all."""
    whole = hamming_of(Communicator(), tiny.IMAGES)
    for world, micro_batch in ((1, 1), (1, 7), (2, 7), (3, 7), (3, 1)):
        assert all(found == whole for found in pool.run(world, hamming_of, micro_batch))


def test_edges_are_decided_on_integers():
    hamming = torch.tensor([[0, 30, 31], [30, 0, 10], [31, 10, 0]])
    found = edges(hamming, 100, 0.7)  # 1 - 30/100 is .7: an edge, though 0.7 has no exact float
    assert found.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


def scored():
    context = tiny.bench(tiny.network())
    method = tiny.method("graph")
    return method, method.score(context), context


def test_threshold_one_keeps_all_but_twins_and_zero_keeps_one():
    method, scores, context = scored()
    every = method.select(scores, context.graph, SelectionRequest(threshold=1.0))
    for group in context.graph.free:
        hamming = scores[f"{group.name}:hamming"]
        twins = int((hamming + torch.eye(len(hamming), dtype=hamming.dtype) == 0).any(1).sum())
        assert group.width - every.counts[group.name] <= twins
    none = method.select(scores, context.graph, SelectionRequest(threshold=0.0))
    assert {none.counts[group.name] for group in context.graph.free} == {1}


def test_a_residual_stream_has_one_index_list():
    method, scores, context = scored()
    plan = method.select(scores, context.graph, SelectionRequest(threshold=0.7))
    stem = context.graph.group("conv1")
    assert stem.producers[:2] == ("conv1", "layer1.0.conv2")
    assert context.graph.group("layer2.0.downsample.0").producers[1] == "layer2.0.conv2"
    small = tiny.cut(context.model, context.graph, plan)
    widths = {name: small.get_submodule(name).out_channels for name in stem.producers}
    assert set(widths.values()) == {plan.counts["conv1"]}


def test_combining_all_layers_leaves_out_those_without_a_hash():
    """On 8x8 inputs halved three times, maps of 1x1 hash to one bit that is always set: it must not count."""
    context = tiny.bench(tiny.network())
    method = tiny.method("graph")
    scores = method.score(context)
    summed = type(method)(type(method).Options(combine="sum"))
    whole = summed.select(scores, context.graph, SelectionRequest(threshold=1.0))
    stream = context.graph.group("layer3.0.downsample.0").producers
    for name in stream[1:]:
        scores[f"{name}:bits"] = torch.tensor([1, tiny.IMAGES])
        scores[f"{name}:hamming"] = torch.zeros_like(scores[f"{name}:hamming"])
    found = summed.select(scores, context.graph, SelectionRequest(threshold=1.0))
    assert (
        found.counts[stream[0]]
        == method.select(scores, context.graph, SelectionRequest(threshold=1.0)).counts[stream[0]]
    )
    assert whole.counts[stream[0]] > 1


def test_a_target_is_met_from_above_by_the_threshold():
    from dist_prune.pruning.selection.cost import macs

    method, scores, context = scored()
    for share in (0.3, 0.5, 0.8):
        plan = method.select(scores, context.graph, SelectionRequest(target=("macs", share)))
        left = macs(context.graph, plan.counts) / macs(context.graph)
        assert share - 0.25 < left <= share


def test_rounding_and_floor_hold():
    method, scores, context = scored()
    plan = method.select(scores, context.graph, SelectionRequest(threshold=0.6, round_to=8, min_channels=5))
    for group in context.graph.free:
        assert plan.counts[group.name] % 8 == 0
    plan = method.select(scores, context.graph, SelectionRequest(threshold=0.0, min_channels=5))
    assert {plan.counts[group.name] for group in context.graph.free} == {5}


@pytest.mark.parametrize("request_", [SelectionRequest(), SelectionRequest(threshold=0.5, target=("macs", 0.5))])
def test_threshold_or_target_but_not_both(request_):
    method, scores, context = scored()
    with pytest.raises(PruneError, match=r"either select\.threshold"):
        method.select(scores, context.graph, request_)


def test_scores_of_another_network_are_refused():
    method, scores, context = scored()
    scores.pop("layer1.0.conv1:hamming")
    with pytest.raises(PruneError, match="another method or for another network"):
        method.select(scores, context.graph, SelectionRequest(threshold=0.7))
