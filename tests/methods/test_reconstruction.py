"""reconstruction on real activations: its moments, and its scores against least squares on the patches."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune import models
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.methods.reconstruction import Options, Reconstruction, readers
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.graph.window import Window
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumer_points
from dist_prune.pruning.repair.input_moments import InputMoments
from dist_prune.pruning.repair.second_moments import exact_total
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from tests.pruning.graph.test_head_groups import network as network_of_units
from tests.support import tiny

RIDGE = 1e-9


def inputs_of(context: DistributedScoringContext, name: str) -> Tensor:
    """(rows, D): what each output position of a layer reads, over all calibration images, by the layer's own window."""
    module, seen = context.model.get_submodule(name), []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for batch in context.loader.batches([context.ids]):
        with torch.no_grad():
            context.model(batch.images)
    handle.remove()
    x = torch.cat(seen)
    if isinstance(module, nn.Conv2d):
        x = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        return x.transpose(1, 2).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


def lost_share(x: Tensor, weight: Tensor, columns: list[int]) -> float:
    """What least squares cannot give back of x (rows, D) times weight (D, O) without some columns, as a share.

    The ridge, towards the weights as they are, is rows of its root; the bias is a column of ones.
    """
    rows, width = x.shape
    kept = [i for i in range(width) if i not in columns]
    ridge = max(RIDGE, width / rows) * (x - x.mean(0)).square().sum(0).mean()
    penalty = ridge.sqrt() * torch.eye(width, dtype=x.dtype)
    ones = torch.cat([torch.ones(rows, 1, dtype=x.dtype), torch.zeros(width, 1, dtype=x.dtype)])
    design = torch.cat([torch.cat([x, penalty])[:, kept], ones], 1)
    wanted = torch.cat([x @ weight, penalty @ weight])
    left = wanted - design @ torch.linalg.lstsq(design, wanted).solution
    outputs = x @ weight
    return float(left.square().sum() / (outputs - outputs.mean(0)).square().sum())


def lost_shares(context: DistributedScoringContext, reader: ChannelPoint) -> list[float]:
    """For each channel, by the patches of the layer that reads it."""
    x, weight = inputs_of(context, reader.point.layer), context.weight(reader.point).flatten(1).T
    taps = len(weight) // reader.point.width
    columns = (reader.positions[:, :, None] * taps + torch.arange(taps)).flatten(1)
    return [lost_share(x, weight, own.tolist()) for own in columns]


def first_to_go(context: DistributedScoringContext, group: str) -> tuple[int, float]:
    scores = Reconstruction(Options(ridge=RIDGE)).score(context)[group]
    return int(scores.argmin()), float(scores.min())


def test_moments_are_those_of_the_patches():
    """3x3 of stride 1 and 2, and a linear layer."""
    context = tiny.bench(tiny.network())
    points = consumer_points(context.graph)
    layers = context.graph.layers
    weights = {point.name: context.weight(point) for point in points}
    kernels = {name: (w.shape[2], w.shape[3]) if w.dim() == 4 else (1, 1) for name, w in weights.items()}
    windows = {p.name: window for p in points if (window := layers[p.layer].window) is not None}
    tables = context.collect(points, InputMoments(windows))
    seen = set()
    for point in points:
        x = inputs_of(context, point.layer)
        found = {key: exact_total(table) for key, table in tables[point.name].items()}
        assert float(found["n"]) == len(x), point.name
        assert torch.allclose(found["x"], x.sum(0), rtol=1e-9, atol=1e-9), point.name
        assert torch.allclose(found["xx"], x.T @ x, rtol=1e-9, atol=1e-9), point.name
        module = context.model.get_submodule(point.layer)
        seen.add((kernels[point.name], module.stride if isinstance(module, nn.Conv2d) else None))
    assert seen >= {((3, 3), (1, 1)), ((3, 3), (2, 2)), ((1, 1), None)}


def test_a_narrow_kernel_of_stride_2_reads_every_second_position():
    point = HookPoint("conv:in", "g", 5, "conv", False, "in")
    maps = torch.randn(3, 5, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistic = InputMoments({"conv:in": Window(stride=(2, 2))})
    tables = {name: state.zero(3) for name, state in statistic.states(point).items()}
    statistic.update(point, tables, maps, torch.arange(3), None)
    x = maps[:, :, ::2, ::2].transpose(0, 1).flatten(1)
    assert torch.allclose(exact_total(tables["xx"]), x @ x.T, atol=1e-9)
    assert float(exact_total(tables["n"])) == x.shape[1] == 48


@pytest.mark.parametrize("group", ["layer1.0.conv1", "layer2.0.conv1"])
def test_the_first_score_is_what_least_squares_loses(group):
    context = tiny.bench(tiny.network())
    (reader,) = readers(context.graph, context.graph.group(group))
    channel, score = first_to_go(context, group)
    lost = lost_shares(context, reader)
    assert score == pytest.approx(min(lost), rel=1e-6)
    assert channel == lost.index(min(lost))


def test_a_residual_stream_is_worth_what_all_its_readers_lose():
    context = tiny.bench(tiny.network())
    found = readers(context.graph, context.graph.group("conv1"))
    channel, score = first_to_go(context, "conv1")
    lost = [sum(shares) for shares in zip(*(lost_shares(context, reader) for reader in found), strict=True)]
    assert len(found) > 1
    assert score == pytest.approx(min(lost), rel=1e-6)
    assert channel == lost.index(min(lost))


def test_an_attention_head_is_worth_what_the_projection_loses():
    context = tiny.bench(network_of_units("vit"))
    group = next(group for group in context.graph.free if group.unit == "head")
    (reader,) = readers(context.graph, group)
    channel, score = first_to_go(context, group.name)
    lost = lost_shares(context, reader)
    assert reader.positions.shape[1] > 1
    assert score == pytest.approx(min(lost), rel=1e-6)
    assert channel == lost.index(min(lost))


def test_conv_groups_are_read_by_the_layer_behind_them():
    """The grouped convolution goes with its group; what is lost is lost behind it."""
    context = tiny.bench(network_of_units("resnext"), images=14)
    group = next(group for group in context.graph.free if group.unit == "conv group")
    found = readers(context.graph, group)
    assert found
    assert all(context.graph.layers[reader.point.layer].groups == 1 for reader in found)
    context.graph = context.graph.restrict_to([group.name])
    score = Reconstruction(Options()).score(context)[group.name]
    assert bool(torch.isfinite(score).all())
    assert len(set(score.tolist())) == group.width


def test_a_twin_goes_first_and_its_repair_keeps_the_function():
    model = tiny.network()
    block = model.get_submodule("layer1.0")
    with torch.no_grad():  # channel 5 becomes channel 2
        block.conv1.weight[5] = block.conv1.weight[2]  # type: ignore[index,union-attr]
        for key in ("weight", "bias", "running_mean", "running_var"):
            getattr(block.bn1, key)[5] = getattr(block.bn1, key)[2]
    channel, score = first_to_go(tiny.bench(model, images=400), "layer1.0.conv1")
    without = first_to_go(tiny.bench(tiny.network(), images=400), "layer1.0.conv1")[1]
    assert channel in (2, 5)
    assert score < without
    other = 7 - channel
    small = copy.deepcopy(model)
    weight = small.get_submodule("layer1.0.conv2").weight
    with torch.no_grad():
        weight[:, other] += weight[:, channel]  # type: ignore[index,operator]
        weight[:, channel] = 0  # type: ignore[index,operator]
    assert torch.allclose(small(tiny.example()), model(tiny.example()), atol=1e-5)


def test_labels_and_gradients_are_not_read():
    context = tiny.bench(tiny.network())
    scores = Reconstruction(Options()).score(context)
    other = tiny.bench(tiny.network())
    other.loader.source.labels[:] = 0  # type: ignore[union-attr,attr-defined]
    for parameter in other.model.parameters():
        parameter.requires_grad_(False)
    again = Reconstruction(Options()).score(other)
    assert all(torch.equal(scores[name], again[name]) for name in scores)


def test_wide_layers_take_the_entries_of_their_maps_apart(monkeypatch):
    """A linear layer of flattened maps: one column per channel, whose entries are rows; weights are set apart."""
    torch.manual_seed(0)
    model = models.create("lenet5_mnist", 10, 1).double().eval()
    graph = trace_groups(model, tiny.example(size=28)[:1])
    linear = next(layer.name for layer in graph.layers.values() if layer.kind == "linear")
    group = next(g for g in graph.free if any(r.point.layer == linear for r in readers(graph, g)))
    (reader,) = readers(graph, group)
    entries = reader.positions.shape[1]
    monkeypatch.setattr("dist_prune.pruning.repair.input_moments.MOST_COLUMNS", reader.point.width - 1)
    monkeypatch.setattr("dist_prune.methods.reconstruction.MOST_COLUMNS", reader.point.width - 1)
    source = open_source("digits", None, "", True)
    feed = ImageLoader(source, TransformConfig(28, (0.3,), (0.4,)), torch.device("cpu"), 0, torch.float64)
    context = tiny.bench(tiny.network(), feed=feed, images=30)
    context.model, context.graph = model, graph
    channel, score = first_to_go(context, group.name)
    maps = inputs_of(context, linear).view(30, reader.width, entries)
    x = maps.permute(0, 2, 1).reshape(-1, reader.width)
    weight = model.get_submodule(linear).weight.detach().view(-1, reader.width, entries)  # type: ignore[operator]
    lost = [lost_share(x, weight.permute(1, 2, 0).flatten(1), [gone]) for gone in range(reader.width)]
    assert entries > 1
    assert score == pytest.approx(min(lost), rel=1e-6)
    assert channel == lost.index(min(lost))


READERS = {
    "dilated": lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=2),
    "reflecting": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 2, stride=2),
    "transposed, overlap": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, dilation=2),
}


def taps_of(module: nn.Module, x: Tensor) -> Tensor:
    """(rows, C taps) what each weight of a layer would be multiplied with, by weights of one entry each."""
    alone = copy.deepcopy(module)
    weight: Tensor = alone.weight  # type: ignore[assignment]
    turned = isinstance(alone, nn.ConvTranspose2d)
    columns = []
    with torch.no_grad():
        alone.bias.zero_()  # type: ignore[union-attr,operator]
        for channel in range(x.shape[1]):
            for tap in range(weight[0, 0].numel()):
                weight.zero_()
                (weight[channel, 0] if turned else weight[0, channel]).view(-1)[tap] = 1
                columns.append(alone(x)[:, 0].flatten())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", READERS)
def test_readers_of_every_window_are_read_as_they_read(kind):
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), READERS[kind](), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    ).double().eval()  # fmt: skip
    context = tiny.bench(model)
    channel, score = first_to_go(context, "0")
    images = next(context.loader.batches([context.ids])).images
    with torch.no_grad():
        x, outputs = taps_of(model[2], model[:2](images)), model[2](model[:2](images)) - model[2].bias.view(-1, 1, 1)
    weight = torch.linalg.lstsq(x, outputs.transpose(0, 1).flatten(1).T).solution
    taps = x.shape[1] // 6
    lost = [lost_share(x, weight, list(range(c * taps, (c + 1) * taps))) for c in range(6)]
    assert channel == lost.index(min(lost))
    assert score == pytest.approx(min(lost), rel=1e-5)
