"""Repair of each kind of layer against brute force: least squares over the weights, whatever the layer computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_prune as dp
from dist_prune import models
from tests.scoring import test_repair
from tests.scoring.test_repair import images
from tests.support import tiny


def plan_without(graph: Any, channels: dict[str, list[int]]) -> Any:
    return replace(test_repair.plan_without(graph, channels), graph=graph)


KINDS = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "conv, stride, no bias": lambda: nn.Conv2d(4, 3, 3, stride=2, bias=False),
    "dilated": lambda: nn.Conv2d(4, 4, 3, dilation=2),
    "dilated depthwise": lambda: nn.Conv2d(4, 4, 3, dilation=2, groups=4),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "reflecting": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2),
    "transposed, overlap": lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
    "transposed, output padding, dilated": lambda: nn.ConvTranspose2d(
        4, 3, 3, stride=2, padding=1, output_padding=1, dilation=2, bias=False
    ),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, stride=1, groups=4),
}


def network(kind: str) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), KINDS[kind](), nn.ReLU(),
        nn.LazyConv2d(5, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(10),
    ).double()  # fmt: skip


def built(kind: str) -> Any:
    model = network(kind)
    with torch.no_grad():
        model(images()[0][0])
    return model.eval()


def design(module: Any, x: Tensor) -> Tensor:
    """(outputs, weights) what each weight of a layer, and its bias, adds to its outputs."""
    tensors = [module.weight] + ([module.bias] if module.bias is not None else [])
    old = [tensor.detach().clone() for tensor in tensors]
    columns = []
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
        for tensor in tensors:
            for i in range(tensor.numel()):
                tensor.view(-1)[i] = 1
                columns.append(module(x).flatten())
                tensor.view(-1)[i] = 0
        for tensor, values in zip(tensors, old, strict=True):
            tensor.copy_(values)
    return torch.stack(columns, 1)


def check(module: Any, x: Tensor, wanted: Tensor, slack: float = 1e-4) -> None:
    """The layer's weights are as good as the best ones, whatever weights they are."""
    table = design(module, x)
    best = table @ torch.linalg.lstsq(table, wanted.flatten()[:, None], driver="gelsy").solution[:, 0]
    with torch.no_grad():
        own = module(x).flatten()
    left, least = ((outputs - wanted.flatten()).square().mean() for outputs in (own, best))
    assert left < least * (1 + slack) + 1e-14
    assert left > 1e-14, "there was nothing to repair"


@pytest.mark.parametrize("kind", KINDS)
def test_the_repair_is_the_best_there_is(kind):
    """The layer gets the repaired layers' inputs; where it mixes channels it also loses one of its own."""
    model = built(kind)
    graph = dp.trace(model, (1, 8, 8))
    gone = {"0": [1, 2, 3], **({"2": [1]} if model[4].groups == 1 else {})}
    plan = plan_without(graph, gone)
    assert set(gone) == {name for name, channels in plan.removed.items() if channels}
    repaired: Any = dp.repair(model, dp.prune(model, plan), plan, images(), ridge=1e-12)
    x = images()[0][0]
    with torch.no_grad():
        check(repaired[4], repaired[:4](x), model[:5](x))
        before = (dp.prune(model, plan)(x) - model(x)).square().mean()
        assert (repaired(x) - model(x)).square().mean() < before


@pytest.mark.parametrize("method", ["least_squares", "fold"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "grouped" not in kind and "depthwise" not in kind])
def test_a_removed_duplicate_leaves_the_same_function(kind, method):
    model = built(kind)
    with torch.no_grad():
        model[2].weight[3], model[2].bias[3] = model[2].weight[0].clone(), model[2].bias[0].clone()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"2": [3]})
    cut = dp.prune(model, plan)
    options: dict[str, Any] = {"ridge": 1e-10} if method == "least_squares" else {}
    repaired = dp.repair(model, cut, plan, images(), method=method, **options)
    x = images()[0][0]
    with torch.no_grad():
        assert not torch.allclose(cut(x), model(x), atol=1e-3)
        assert torch.allclose(repaired(x), model(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_removed_is_nothing_changed(kind):
    model = built(kind)
    plan = plan_without(dp.trace(model, (1, 8, 8)), {})
    repaired = dp.repair(model, dp.prune(model, plan), plan, images())
    for name, tensor in model.state_dict().items():
        assert torch.allclose(repaired.state_dict()[name], tensor, atol=1e-6), name


def seen(model: nn.Module, *names: str) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of layers on the images."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, y, name=name: found.update({name: (args[0], y)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(images()[0][0])
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def vit(**sizes: Any) -> Any:
    return tiny.network(name="vit_tiny_patch16_224", patch_size=4, depth=2, embed_dim=24, num_heads=3, **sizes)


@pytest.mark.parametrize("scales", [{}, {"init_values": 0.3, "drop_path_rate": 0.2}], ids=["plain", "layer scale"])
def test_attention_and_mlp_on_tokens_are_the_best_there_is(scales):
    """The out-projection without a head, and the MLP's second layer without hidden units; sums are repaired."""
    model = vit(**scales)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight *= 30  # the stream's error is as large as the MLP's
    factor = 1.0
    if scales:
        factor = torch.linspace(0.2, 2, 24, dtype=torch.float64)
        model.blocks[0].ls1.gamma.data, model.blocks[0].ls2.gamma.data = factor.flip(0), factor
    graph = dp.trace(model, (1, 8, 8))
    heads = next(group.name for group in graph.free if group.unit == "head")
    assert heads.startswith("blocks.0.")
    plan = plan_without(graph, {heads: [1], "blocks.0.mlp.fc1": list(range(70))})
    repaired = dp.repair(model, dp.prune(model, plan), plan, images(), ridge=1e-12)
    names = "blocks.0.attn.proj", "blocks.0.norm2", "blocks.0.mlp.fc2"
    (_, wanted), (stream, _), (_, mlp) = seen(model, *names)
    (x, _), (own_stream, _), (hidden, _) = seen(repaired, *names)
    assert x.shape[-1] == 16
    check(repaired.get_submodule(names[0]), x, wanted)
    check(repaired.get_submodule(names[2]), hidden, (stream - own_stream) / factor + mlp)


def test_a_shortcut_behind_a_scaled_convolution_is_repaired():
    """ConvNeXt's second block, whose output is multiplied by a parameter before it is added."""
    torch.manual_seed(0)
    sizes = {"depths": (2, 1, 1, 1), "dims": (8, 12, 12, 12), "conv_mlp": True, "ls_init_value": 0.5}
    model: Any = models.create("convnext_atto", 10, 1, kwargs=sizes).double().eval()
    blocks = model.stages[0].blocks
    with torch.no_grad():
        for block in blocks:
            block.gamma.copy_(torch.linspace(0.3, 2, 8))
            block.mlp.fc2.weight *= 20
    graph = dp.trace(model, (1, 32, 32))
    names = [f"stages.0.blocks.{block}.mlp.fc1" for block in (0, 1)]
    plan = plan_without(graph, {name: list(range(20)) for name in names})
    batches = [(torch.nn.functional.interpolate(x, 32), y) for x, y in images()]
    repaired: Any = dp.repair(model, dp.prune(model, plan), plan, batches, ridge=1e-12)
    x = batches[0][0]
    with torch.no_grad():
        (stream, own) = (net.stages[0].blocks[0](net.stem(x)) for net in (model, repaired))
        block = repaired.stages[0].blocks[1]
        hidden = block.mlp.drop1(block.mlp.act(block.mlp.fc1(block.norm(block.conv_dw(own)))))
        wanted = (model.stages[0].blocks[1](stream) - own) / block.gamma.view(1, -1, 1, 1)
    check(block.mlp.fc2, hidden, wanted)


@pytest.mark.parametrize("method", ["least_squares", "fold"])
@pytest.mark.parametrize("unit", ["head", "channel"])
def test_a_removed_duplicate_of_a_vit_leaves_the_same_function(unit, method):
    model = vit()
    qkv, fc1 = model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1
    with torch.no_grad():
        for tensor in (qkv.weight, qkv.bias):
            tensor.unflatten(0, (3, 3, 8))[:, 2] = tensor.unflatten(0, (3, 3, 8))[:, 0].clone()
        fc1.weight[7], fc1.bias[7] = fc1.weight[4].clone(), fc1.bias[4].clone()
    graph = dp.trace(model, (1, 8, 8))
    heads = next(group.name for group in graph.free if group.unit == "head")
    plan = plan_without(graph, {heads: [2]} if unit == "head" else {"blocks.0.mlp.fc1": [7]})
    cut = dp.prune(model, plan)
    options: dict[str, Any] = {"ridge": 1e-10} if method == "least_squares" else {}
    repaired = dp.repair(model, cut, plan, images(), method=method, **options)
    x = images()[0][0]
    with torch.no_grad():
        assert not torch.allclose(cut(x), model(x), atol=1e-4)
        assert torch.allclose(repaired(x), model(x), atol=1e-5)


@pytest.mark.parametrize("method", ["least_squares", "fold"])
def test_a_removed_duplicate_of_linear_layers_leaves_the_same_function(method):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).double().eval()
    with torch.no_grad():
        model[1].weight[5], model[1].bias[5] = model[1].weight[2].clone(), model[1].bias[2].clone()
    plan = plan_without(dp.trace(model, (1, 8, 8)), {"1": [5]})
    options: dict[str, Any] = {"ridge": 1e-10} if method == "least_squares" else {}
    repaired = dp.repair(model, dp.prune(model, plan), plan, images(), method=method, **options)
    with torch.no_grad():
        assert torch.allclose(repaired(images()[0][0]), model(images()[0][0]), atol=1e-5)


def test_groups_of_convolutions_are_repaired_whole():
    """A network without one of its convolution's groups comes nearer to the dense one."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(216, 10),
    ).double().eval()  # fmt: skip
    graph = dp.trace(model, (1, 8, 8))
    group = next(group for group in graph.free if group.unit == "conv group")
    plan = plan_without(graph, {group.name: [0]})
    cut = dp.prune(model, plan)
    repaired: Any = dp.repair(model, cut, plan, images(), ridge=1e-12)
    x = images()[0][0]
    with torch.no_grad():
        check(repaired[4], repaired[:4](x), model[:5](x))
        before, after = ((small(x) - model(x)).square().mean() for small in (cut, repaired))
    assert after < 0.5 * before


def test_layers_that_stay_are_counted_with_the_reason(capsys):
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.own = nn.Conv2d(1, 4, 3, padding=1), Scaled(4, 4, 1)
            self.again, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)

        def forward(self, x):
            x = torch.relu(self.own(torch.relu(self.first(x))))
            return self.head(self.again(torch.relu(self.again(x))).mean((2, 3)))

    torch.manual_seed(0)
    model = Twice().double().eval()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"first": [1]})
    dp.repair(model, dp.prune(model, plan), plan, images(), verbose=True)
    said = capsys.readouterr().out
    assert "2 layers stay as they are" in said
    assert "1 are of class Scaled, which computes something else (own)" in said
    assert "1 run several times (again)" in said


@pytest.mark.slow  # the best weights of all outputs at once take a minute
def test_sums_are_repaired_where_the_shortcut_is_computed_behind_the_layer():
    """The second convolution of a residual block also takes away the error of its shortcut, in units of its norm."""
    model: Any = tiny.network()
    graph = dp.trace(model, (1, 8, 8))
    plan = plan_without(graph, {"layer1.0.conv1": [0, 1, 2, 3], "layer2.0.conv1": [0, 1, 2]})
    repaired: Any = dp.repair(model, dp.prune(model, plan), plan, images(), ridge=1e-12)
    (_, wanted), (_, shortcut) = seen(model, "layer2.0.conv2", "layer2.0.downsample")
    (x, _), (stream, _) = seen(repaired, "layer2.0.conv2", "layer2.0.conv1")
    norm, old = repaired.layer2[0].bn2, model.layer2[0].bn2
    with torch.no_grad():
        before = dp.prune(model, plan).get_submodule("layer2.0.downsample")(stream)  # it is repaired later
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1)
        target = wanted + (shortcut - before) / scale
        module = nn.Conv2d(x.shape[1], target.shape[1], 3, padding=1).double()
        module.weight.copy_(repaired.layer2[0].conv2.weight)
        assert module.bias is not None
        module.bias.copy_(old.running_mean - norm.running_mean)
    check(module, x, target)
