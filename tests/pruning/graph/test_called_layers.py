"""torch's MultiheadAttention and its encoders with layers that are called, and heads that can go."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.called_layers import LinearView, call_layers
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

DOUBLE = torch.float64


def attention(batch_first: bool = True, **kwargs: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **kwargs).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def calls(batch_first: bool) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Arguments of a call: self- and cross-attention, masks of both kinds and shapes, weights of each head."""
    shape = (3, 5, 16) if batch_first else (5, 3, 16)
    x, y = torch.randn(shape, dtype=DOUBLE), torch.randn(shape, dtype=DOUBLE).flip(0)[:3]
    y = y if batch_first else torch.randn(7, 3, 16, dtype=DOUBLE)
    padding, causal = torch.zeros(3, 5, dtype=torch.bool), torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding[1, 3:] = True
    return [
        ((x, x, x), {}),
        ((x, x, x), {"need_weights": False}),
        ((x, y, y), {"need_weights": False}),
        ((x, x, x), {"key_padding_mask": padding, "need_weights": False}),
        ((x, x, x), {"attn_mask": causal, "average_attn_weights": False}),
        ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        ((x, x, x), {"attn_mask": torch.randn(12, 5, 5, dtype=DOUBLE)}),
        ((x[0], x[0], x[0]), {}),
    ]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_outputs_and_names_stay(units, batch_first, gradients):
    """torch takes its own fast path without gradients, in evaluation mode, with the batch first."""
    module = attention(batch_first)
    other = copy.deepcopy(module)
    call_layers(other, units)
    assert list(other.state_dict()) == list(module.state_dict())
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in module.named_parameters()]
    for arguments, options in calls(batch_first):
        with torch.set_grad_enabled(gradients):
            out, weights = module(*arguments, **options)
            found, found_weights = other(*arguments, **options)
        assert torch.allclose(found, out, atol=1e-12)
        assert (weights is None) == (found_weights is None)
        assert weights is None or torch.allclose(found_weights, weights, atol=1e-12)


def test_copies_and_pickles_keep_their_own_parameters():
    module = attention()
    call_layers(module, "whole")
    x = torch.randn(2, 5, 16, dtype=DOUBLE)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])
        with torch.no_grad():
            other.in_proj_weight.zero_()
        assert float(other.in_proj.weight.detach().abs().max()) == 0
        assert float(module.in_proj.weight.detach().abs().max()) > 0


@pytest.mark.parametrize("kwargs", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12, "vdim": 12}])
def test_forms_that_are_not_known_stay_as_they_are(kwargs):
    module = attention(**kwargs)
    call_layers(module, "whole")
    assert type(module) is nn.MultiheadAttention
    assert not [child for child in module.children() if isinstance(child, LinearView)]


class Encoded(nn.Module):
    """torch's own encoder, which in evaluation mode without gradients computes a whole layer by one kernel."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, activation="gelu")
        self.stem, self.encoder = nn.Conv2d(3, 16, 4, 4), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


def encoded() -> nn.Module:
    torch.manual_seed(0)
    model = Encoded().double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_heads_of_torchs_encoder(units, streams):
    model, images = encoded(), torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    with torch.no_grad():
        before = model(images)
    graph = trace_groups(model, images[:1], streams=streams, units=units)
    with torch.no_grad():
        assert torch.allclose(model(images), before, atol=1e-10)
    found = [group for group in graph.free if group.unit != "channel"]
    assert [group.width for group in found] == ([4, 4] if units == "whole" else [4, 4, 4, 4])
    assert ("stem" in {group.name for group in graph.free}) == streams
    plan = Plan({group.name: (0, 2) for group in graph.free}, {group.name: group.width for group in graph.groups})
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(images)
    small = tiny.cut(model, graph, plan)
    with torch.no_grad():
        found = small(images)
    assert torch.allclose(found, expected, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) == cost.params(graph, plan.counts)
    loaded = rebuild(Encoded().double(), plan, small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), found)
    loaded.train()(images).square().mean().backward()


class Crossed(nn.Module):
    """Attention of one query to all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 16, 4, 4), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.head(self.attn(tokens[:, :1], tokens, tokens)[0][:, 0])


@pytest.mark.parametrize("units", ["whole", "head_width"])
def test_heads_that_read_other_tokens_than_they_ask_are_left_whole(units):
    torch.manual_seed(0)
    model, images = Crossed().double().eval(), torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    with torch.no_grad():
        before = model(images)
    graph = trace_groups(model, images[:1], units=units)
    assert not [group for group in graph.free if group.unit != "channel"]
    with torch.no_grad():
        assert torch.allclose(model(images), before, atol=1e-12)
