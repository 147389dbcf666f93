"""The published criteria against their formulas, written out naively on real images."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from dist_prune import methods
from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.methods.chip import independence
from dist_prune.methods.fpgm import distance_scores, distances
from dist_prune.methods.hrank import map_rank
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.curvature import Hutchinson
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from tests.support import tiny

INNER = "layer2.0.conv1"  # its batch norm is layer2.0.bn1, its one consumer layer2.0.conv2
STREAM = "conv1"  # stem and layer1.0.conv2; consumed by layer1.0.conv1, layer2.0.conv1, layer2.0.downsample.0


def build(name: str, **options) -> base.RankingMethod:
    kind = methods.find(name)
    return kind(kind.Options(**options))  # type: ignore[return-value]


def importance_of(name: str, context: DistributedScoringContext, **options) -> dict[str, torch.Tensor]:
    built = build(name, **options)
    return built.importance(built.score(context), built.prunable(context.graph))


def micro_batches(context: DistributedScoringContext):
    """(images, labels) of each fixed micro-batch."""
    for start in range(0, context.images, tiny.MICRO):
        part = next(context.loader.batches([context.ids[start : start + tiny.MICRO]]))
        yield part.images, part.labels


def inputs_of(context: DistributedScoringContext, layer: str) -> torch.Tensor:
    """(n, C, H, W): what enters a layer."""
    seen = []
    hook = context.model.get_submodule(layer).register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    with torch.no_grad():
        for images, _ in micro_batches(context):
            context.model(images)
    hook.remove()
    return torch.cat(seen)


def even(values: torch.Tensor) -> torch.Tensor:
    return values / values.mean()


def rows_of(context: DistributedScoringContext, layer: str) -> np.ndarray:
    return context.model.get_submodule(layer).weight.detach().flatten(1).numpy()  # type: ignore[union-attr]


def test_fpgm_is_the_sum_of_distances():
    context = tiny.bench(tiny.network())
    rows = rows_of(context, INNER)
    direct = [sum(np.sqrt(((a - b) ** 2).sum()) for b in rows) for a in rows]
    found = build("fpgm").score(context)
    np.testing.assert_allclose(found[INNER].numpy(), direct, rtol=1e-12)
    stream = even(found["conv1"]) + even(found["layer1.0.conv2"])
    assert torch.allclose(importance_of("fpgm", context)[STREAM], stream)


def test_fpgm_mixed_form_lets_small_norms_go_first():
    filters = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, norms = distance_scores(filters, 0.7), filters.norm(dim=1)
    small = norms.argsort()[:3]
    assert found.argsort()[:3].tolist() == small.tolist()
    stay = sorted(set(range(10)) - set(small.tolist()))
    assert torch.equal(found[stay], distances(filters[stay])), "the median is that of the filters that stay"


def test_whc_is_its_formula():
    context = tiny.bench(tiny.network())
    rows = rows_of(context, INNER)
    norms = np.linalg.norm(rows, axis=1)
    direct = np.zeros(len(rows))
    for i, j in itertools.permutations(range(len(rows)), 2):
        direct[i] += norms[i] * norms[j] * (1 - abs(rows[i] @ rows[j]) / norms[i] / norms[j])
    np.testing.assert_allclose(build("whc").score(context)[INNER].numpy(), direct, rtol=1e-10)


class Joined(nn.Module):
    """Two convolutions, concatenated, behind one batch norm."""

    def __init__(self, affine: bool = True, act=torch.relu):
        super().__init__()
        self.act = act
        self.left, self.right = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 5, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8, affine=affine), nn.Conv2d(8, 10, 1)
        if affine:
            nn.init.uniform_(self.norm.weight, -1, 1)

    def forward(self, x):
        x = self.act(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.last(x).mean((2, 3))


def joined(**kwargs) -> DistributedScoringContext:
    torch.manual_seed(0)
    return tiny.bench(Joined(**kwargs).double().eval())


def test_bn_scale_reads_its_part_of_a_concatenation():
    context = joined()
    found, scale = importance_of("bn_scale", context), context.model.norm.weight.detach().abs()  # type: ignore[union-attr]
    assert torch.equal(found["left"], scale[:3])
    assert torch.equal(found["right"], scale[3:])
    context = tiny.bench(tiny.network())
    scales = [context.model.get_submodule(name).weight.detach() for name in ("bn1", "layer1.0.bn2")]  # type: ignore
    assert torch.allclose(importance_of("bn_scale", context)[STREAM], even(scales[0]) + even(scales[1]))


def test_bn_scale_leaves_alone_what_no_batch_norm_scales():
    limited = build("bn_scale").prunable(joined(affine=False).graph)
    assert [group.protected for group in limited.groups[:2]] == ["no batch norm scales its channels"] * 2


def test_group_norm_is_torch_pruning_s():
    """The peer's own program, without its normalisation (a factor per group) and its mean over layers."""
    context = tiny.bench(tiny.network())
    model = context.model
    graph = tp.DependencyGraph().build_dependency(model, tiny.example()[:1])
    measure = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    found = build("group_norm").score(context)
    for group in context.graph.free:
        module = model.get_submodule(group.name)
        theirs = measure(graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(group.width))))
        assert torch.allclose(found[group.name], theirs.double()), group.name  # type: ignore[union-attr]


def test_apoz_counts_zeros_behind_the_relu():
    context = tiny.bench(tiny.network())
    found = importance_of("apoz", context)
    maps = inputs_of(context, "layer2.0.conv2")
    assert torch.equal(found[INNER], 1 - (maps == 0).sum((0, 2, 3)).double() / maps[:, 0].numel())
    taps = [inputs_of(context, name) for name in ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0")]
    zeros, count = sum((t == 0).sum((0, 2, 3)) for t in taps), sum(t[:, 0].numel() for t in taps)
    assert torch.equal(found[STREAM], 1 - zeros.double() / count), "the tap of a stream is behind the addition"  # type: ignore


def test_apoz_refuses_a_network_without_a_relu():
    with pytest.raises(PruneError, match="zeros after a ReLU"):
        build("apoz").score(joined(act=torch.tanh))


def test_hrank_is_the_mean_matrix_rank():
    context = tiny.bench(tiny.network())
    maps = inputs_of(context, "layer2.0.conv2").numpy()
    ranks = np.linalg.matrix_rank(maps)
    np.testing.assert_allclose(importance_of("hrank", context)[INNER].numpy(), ranks.mean(0), rtol=1e-12)
    assert ranks.min() < ranks.max()
    assert map_rank(torch.zeros(2, 3, 4)).tolist() == [0, 0]
    last = build("hrank").prunable(context.graph).group("layer3.0.downsample.0")
    assert last.protected == "a linear layer consumes its maps: single numbers have no rank"


@pytest.mark.parametrize(("channels", "positions"), [(6, 20), (20, 6), (7, 7)])
def test_chip_is_the_fall_of_the_nuclear_norm(channels, positions):
    image = torch.randn(channels, positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64).relu()
    direct = []
    for i in range(channels):
        masked = image.clone()
        masked[i] = 0
        direct.append(torch.linalg.matrix_norm(image, "nuc") - torch.linalg.matrix_norm(masked, "nuc"))
    assert torch.allclose(independence(image), torch.stack(direct), atol=1e-7)


def test_chip_is_the_mean_over_images():
    context = tiny.bench(tiny.network())
    maps = inputs_of(context, "layer2.0.conv2").flatten(2)
    assert torch.allclose(
        importance_of("chip", context)[INNER], torch.stack([independence(image) for image in maps]).mean(0)
    )


def gradients(context: DistributedScoringContext, layers: list[str]):
    """Per micro-batch: layer -> (weight, gradient of the mean loss, shift, its gradient)."""
    modules = [context.model.get_submodule(name) for name in layers]
    for images, labels in micro_batches(context):
        context.model.zero_grad()
        nn.functional.cross_entropy(context.model(images), labels).backward()
        yield [(m.weight.detach(), m.weight.grad.clone(), m.bias, getattr(m.bias, "grad", None)) for m in modules]


def test_taylor_s_gate_is_scale_and_shift_of_the_batch_norm():
    """Also on a stream: a gate shared by all consumers is a gate shared by all batch norms that feed it."""
    context = tiny.bench(tiny.network())
    found = importance_of("taylor", context)
    for group, norms in ((INNER, ["layer2.0.bn1"]), (STREAM, ["bn1", "layer1.0.bn2"])):
        squares = []
        for parts in gradients(context, norms):
            squares.append(sum((w * gw + b.detach() * gb) for w, gw, b, gb in parts) ** 2)  # type: ignore[operator]
        assert torch.allclose(found[group], torch.stack(squares).mean(0), rtol=1e-8), group


def test_taylor_divides_a_stream_by_its_blocks():
    context = tiny.bench(tiny.network(name="resnet20_cifar"))
    plain, divided = importance_of("taylor", context, blocks=False), importance_of("taylor", context)
    for group in context.graph.free:
        assert torch.allclose(plain[group.name], divided[group.name] * max(1, len(group.producers) - 1))


def test_weights_form_of_taylor_and_obd():
    context = tiny.bench(tiny.network())
    taylor, obd = importance_of("taylor", context, form="weight"), importance_of("obd", context)
    found = list(gradients(context, ["conv1", "layer1.0.conv2"]))
    each = [sum(((w * gw) ** 2).flatten(1).sum(1) for w, gw, _, _ in parts) for parts in found]
    direct = torch.stack(each).mean(0)  # type: ignore[arg-type]
    assert torch.allclose(taylor[STREAM], direct, rtol=1e-8)
    assert torch.allclose(obd[STREAM], direct / 2, rtol=1e-8)
    each = [sum((w * gw).flatten(1).sum(1) ** 2 for w, gw, _, _ in parts) for parts in found]
    grouped = importance_of("taylor", context, form="grouped")
    assert torch.allclose(grouped[STREAM], torch.stack(each).mean(0), rtol=1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaled", [False, True])
def test_hessian_products_are_differences_of_gradients(scaled):
    context = joined(act=torch.tanh)
    statistic, step = Hutchinson(5, scaled), 1e-6
    points = [point.at_weight for point in context.hook_points]
    ids = torch.arange(tiny.MICRO)
    weights = [context.model.get_submodule(point.layer).weight for point in points]
    signs = [statistic.direction(point, w, ids) for point, w in zip(points, weights, strict=True)]  # type: ignore
    found = context.collect(points, statistic, backward=True)
    images, labels = next(micro_batches(context))

    def moved(by: float) -> list[torch.Tensor]:
        with torch.no_grad():
            for w, v in zip(weights, signs, strict=True):
                w.add_(by * v)  # type: ignore[union-attr,operator]
        context.model.zero_grad()
        nn.functional.cross_entropy(context.model(images), labels).backward()
        return [w.grad.clone() for w in weights]  # type: ignore[union-attr]

    up, down = moved(step), moved(-2 * step)
    moved(step)
    for point, w, v, a, b in zip(points, weights, signs, up, down, strict=True):
        each = v * (a - b) / (2 * step) * (w.detach() ** 2 if scaled else 1)  # type: ignore[union-attr]
        assert torch.allclose(found[point.name]["rows"][0], each.flatten(1).sum(1), rtol=1e-4, atol=1e-7), point.name


def test_hutchinson_finds_the_trace():
    """The exact diagonal of one layer's Hessian, by double differentiation, against the mean over many signs."""
    context = joined(act=torch.tanh)
    context.ids = context.ids[: tiny.MICRO]
    point = next(point for point in context.hook_points if point.name == "left")
    images, labels = next(micro_batches(context))
    weight = context.model.get_submodule("left").weight
    loss = nn.functional.cross_entropy(context.model(images), labels)
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)  # type: ignore[arg-type]
    exact = torch.zeros(weight.numel(), dtype=torch.float64)  # type: ignore[operator,arg-type]
    for i, value in enumerate(first.flatten()):
        exact[i] = torch.autograd.grad(value, weight, retain_graph=True)[0].flatten()[i]  # type: ignore[arg-type]
    trace = exact.view(3, -1).sum(1)
    many = [context.collect([point.at_weight], Hutchinson(seed, False), backward=True) for seed in range(150)]
    found = torch.stack([tables["left:weight"]["rows"][0] for tables in many])
    error = found.mean(0) - trace
    assert (error.abs() < 5 * found.std(0) / 150**0.5 + 1e-9).all()
    assert torch.corrcoef(torch.stack([found.mean(0), trace]))[0, 1] > 0.9


def test_group_fisher_gates_all_consumers_at_once():
    """One image at a time, with a real mask tensor on the inputs of all layers that consume the channel."""
    context = tiny.bench(tiny.network(), images=9)
    found = importance_of("group_fisher", context, per="nothing")
    consumers = ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
    mask = torch.ones(16, dtype=torch.float64, requires_grad=True)
    hooks = [
        context.model.get_submodule(name).register_forward_pre_hook(lambda _m, x: (x[0] * mask[None, :, None, None],))
        for name in consumers
    ]
    total = torch.zeros(16, dtype=torch.float64)
    for images, labels in micro_batches(context):
        for i in range(len(labels)):
            loss = nn.functional.cross_entropy(context.model(images[i : i + 1]), labels[i : i + 1])
            total += torch.autograd.grad(loss, mask)[0] ** 2
    for hook in hooks:
        hook.remove()
    assert torch.allclose(found[STREAM], total, rtol=1e-8)


def test_group_fisher_s_price():
    context = tiny.bench(tiny.network(), images=9)
    plain, memory = (importance_of("group_fisher", context, per=per)[STREAM] for per in ("nothing", "memory"))
    assert torch.allclose(plain / memory, torch.full((16,), 2.0 * 64, dtype=torch.float64)), "two maps of 8x8"
    macs = importance_of("group_fisher", context, per="macs")[STREAM]
    out = 64 * 9 * (1 + 16)  # one output channel of the stem and of layer1.0.conv2
    into = 64 * 9 * 16 + 2 * 16 * 9 * 32  # one input channel of layer1.0.conv1, and of both strided ones
    assert torch.allclose(plain / macs, torch.full((16,), float(out + into), dtype=torch.float64))


def test_scores_of_another_method_are_refused():
    graph: DependencyGraph = trace_groups(tiny.network(), tiny.example()[:1])
    for name in ("fpgm", "bn_scale", "group_norm", "apoz", "hrank", "taylor", "obd", "chip", "group_fisher"):
        with pytest.raises(PruneError, match="made by another method"):
            build(name).importance({}, build(name).prunable(graph))


def test_chip_judges_each_part_of_a_concatenation_by_itself():
    context = joined()
    maps = inputs_of(context, "last").flatten(2)
    found = importance_of("chip", context)
    for name, part in (("left", maps[:, :3]), ("right", maps[:, 3:])):
        assert torch.allclose(found[name], torch.stack([independence(image) for image in part]).mean(0)), name


def test_no_second_derivative_is_said():
    with pytest.raises(PruneError, match="needs second derivatives, and torch has none"):
        build("hessian_trace").score(joined(act=nn.functional.hardsigmoid))


def test_more_probes_are_a_mean_of_passes():
    """The first pass of two is the pass of one."""
    one, two = (build("hessian_trace", probes=n).score(joined()) for n in (1, 2))
    seed = joined().generator("hutchinson", 1).initial_seed()
    context = joined()
    found = context.collect([point.at_weight for point in context.hook_points], Hutchinson(seed, False), backward=True)
    for point in context.hook_points:
        weight, tables = context.weight(point).flatten(1), found[point.at_weight.name]
        other = weight.square().sum(1) * tables["rows"].sum(0) / int(tables["batches"]) / (2 * weight.shape[1])
        assert torch.allclose(two[point.at_weight.name], (one[point.at_weight.name] + other) / 2)


@pytest.mark.parametrize(("positions", "judged"), [(1, False), (2, True)])
def test_maps_of_a_single_number_are_not_judged(positions, judged):
    graph = tiny.bench(tiny.network()).graph
    name = graph.free[1].name
    layers = {key: replace(layer, positions=positions) if key == name else layer for key, layer in graph.layers.items()}
    found = tiny.method("hrank").prunable(replace(graph, layers=layers)).group(name)
    assert (found.protected == "") is judged
    assert judged or found.protected == "its 1x1 maps have no rank"
