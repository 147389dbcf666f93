"""Norms over channels refitted after a cut: against least squares by brute force, and on real ranks."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_prune as dp
from dist_prune import models
from dist_prune.config import loading
from dist_prune.errors import PruneError
from dist_prune.methods import options_of
from dist_prune.pruning.graph.stream_layers import norm_form
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.surgeon import apply_plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.norm_refit import refit_norms
from tests.support import tiny

COUNT = 37
KINDS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 3}),
    "rms": ("vit_tiny_patch16_224", {"patch_size": 4, "depth": 2, "embed_dim": 24, "norm_layer": "rmsnorm"}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "patch_size": 1, "img_size": None}),
}


def dense(kind: str) -> nn.Module:
    name, kwargs = KINDS[kind]
    kwargs = {key: value for key, value in {"img_size": 8, **kwargs}.items() if value is not None}
    torch.manual_seed(0)
    model = models.create(name, 10, 1, kwargs=kwargs).double().eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def cut(kind: str) -> tuple[nn.Module, nn.Module, Any, Plan]:
    model = dense(kind)
    graph = trace_groups(model, tiny.example()[:1], streams=True)
    removed = {g.name: tuple(range(0, g.width, 3)) for g in graph.free if g.name in ("patch_embed.proj", "stem.0")}
    plan = Plan(removed, {group.name: group.width for group in graph.groups})
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    return model, small, graph, plan


def refitted(kind: str, ranks: Any = None) -> dict[str, torch.Tensor]:
    model, small, graph, plan = cut(kind)
    comm = tiny.machine(ranks).comm
    refit_norms(model, small, graph, plan, tiny.digits_feed(), np.arange(COUNT), 5, comm)
    return {name: tensor.clone() for name, tensor in small.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_shifts_are_least_squares(kind):
    """Channel by channel, as torch solves for them from all places of all images at once."""
    model, small, _, _ = cut(kind)
    found = refitted(kind)
    images = next(tiny.digits_feed().batches([np.arange(COUNT)])).images
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    names = [name for name, module in small.named_modules() if norm_form(module) is not None]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, out, name=name: seen.__setitem__(name, (args[0], out))
        )
    with torch.no_grad():
        model(images)
    weights: list[dict[str, Any]] = [net.state_dict() for net in (model, small)]
    changed = [n for n in names if weights[0][f"{n}.weight"].shape != weights[1][f"{n}.weight"].shape]
    assert len(changed) >= 2
    for name in changed:
        x, y = seen[name]
        norm = copy.deepcopy(small.get_submodule(name))
        axis = 1 if kind == "convnext" and x.shape[1] == model.get_submodule(name).weight.numel() else -1
        kept = [i for i in range(x.shape[axis]) if i % 3]
        norm.weight.data.fill_(1)
        shift = getattr(norm, "bias", None) is not None
        if shift:
            norm.bias.data.fill_(0)
        index = torch.tensor(kept)
        with torch.no_grad():
            z = norm(x.index_select(axis, index)).movedim(axis, -1).flatten(0, -2)
        target = y.index_select(axis, index).movedim(axis, -1).flatten(0, -2)
        for channel in range(len(kept)):
            columns = [z[:, channel], torch.ones(len(z), dtype=z.dtype)][: 2 if shift else 1]
            best = torch.linalg.lstsq(torch.stack(columns, 1), target[:, channel, None]).solution.flatten()
            assert float(found[f"{name}.weight"][channel]) == pytest.approx(float(best[0]), rel=1e-6, abs=1e-8)
            if shift:
                assert float(found[f"{name}.bias"][channel]) == pytest.approx(float(best[1]), rel=1e-6, abs=1e-8)


def test_every_number_of_ranks_gives_the_same_bits(pool):
    one = refitted("vit")
    for other in pool.run(3, rank_refit):
        assert all(torch.equal(other[name], one[name]) for name in one)


def rank_refit(ranks: Any) -> dict[str, torch.Tensor]:
    return refitted("vit", ranks)


def test_a_plan_without_streams_refits_nothing():
    model = dense("vit")
    graph = trace_groups(model, tiny.example()[:1], streams=True)
    plan = Plan({"blocks.0.mlp.fc1": (0, 1)}, {group.name: group.width for group in graph.groups})
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    comm = tiny.machine().comm
    assert refit_norms(model, small, graph, plan, tiny.digits_feed(), np.arange(COUNT), 5, comm) == []


def test_refit_without_streams_is_refused():
    with pytest.raises(PruneError, match=r"Set backbone\.streams=true, or select\.norms=plain"):
        loading.load("quickstart", ["select.norms=refit"], options_of)


def test_the_library_refits():
    model, small, graph, plan = cut("vit")
    feed = next(tiny.digits_feed().batches([np.arange(COUNT)]))
    data = [(feed.images, feed.labels)]
    repaired = dp.repair(model, small, plan, data, graph, method="none", norms="refit")
    assert not torch.equal(repaired.get_submodule("norm").weight, small.get_submodule("norm").weight)  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="norms: unknown value"):
        dp.repair(model, small, plan, data, graph, norms="fit")  # type: ignore[arg-type]
