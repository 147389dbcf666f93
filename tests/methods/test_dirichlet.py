"""Dirichlet switches: divergences against torch's, gradients, worlds, resuming within the training, departures."""

import pytest
import torch
from pydantic import ValidationError
from torch import distributions
from torch.nn import functional

from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.dirichlet import method as dirichlet
from dist_prune.methods.dirichlet import quirks
from dist_prune.methods.dirichlet.posteriors import (
    Dirichlet,
    LogisticNormal,
    correlation,
    dirichlet_kl,
    log_mean,
    moments,
)
from dist_prune.methods.dirichlet.switch_training import SwitchTraining
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.methods.test_fisher import lenet_bench
from tests.support import tiny

GROUP = "layer1.0.conv1"


def switches_with(**options) -> dirichlet.DirichletSwitches:
    return dirichlet.DirichletSwitches(dirichlet.Options(**{"batch": 16, **options}))


def bench_of(ranks: Communicator | None = None, partial=None):
    """Two groups of a small network: the rest is left alone."""
    bench = tiny.bench(tiny.network(), ranks, partial=partial)
    rest = [g.name for g in bench.graph.free if g.name not in ("conv1", GROUP)]
    bench.graph = bench.graph.exclude(rest)
    return bench


def test_the_divergence_is_torch_s():
    phi = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 0.1
    for alpha in (0.05, 1.0, 2.0):
        prior = distributions.Dirichlet(torch.full_like(phi, alpha))
        expected = distributions.kl_divergence(distributions.Dirichlet(phi), prior)
        assert torch.allclose(dirichlet_kl(phi, alpha), expected)
        assert float(dirichlet_kl(torch.full_like(phi, alpha), alpha)) == pytest.approx(0, abs=1e-12)
    assert float(Dirichlet(9, 2.0, None).kl().detach()) == pytest.approx(0, abs=1e-12), "it starts at the prior"
    assert float(Dirichlet(9, 2.0, -1.0).phi.detach()[0]) == pytest.approx(0.3133, abs=1e-4)


def test_the_logistic_normal_s_divergence_is_torch_s():
    posterior, generator = LogisticNormal(6, 2.0, 3), torch.Generator().manual_seed(0)
    assert float(posterior.kl().detach()) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for parameter in posterior.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        d, u = posterior.diagonal, posterior.factor
        own = distributions.MultivariateNormal(posterior.mu, torch.diag(d) + u.T @ u)
        prior = distributions.MultivariateNormal(torch.zeros(6).double(), posterior.variance * torch.eye(6).double())
        assert torch.allclose(posterior.kl(), distributions.kl_divergence(own, prior))


def test_a_dirichlet_s_covariance_is_negative_and_a_logistic_normal_s_need_not_be():
    posterior = Dirichlet(5, 2.0, None)
    with torch.no_grad():
        posterior.v.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0]))
    mean, covariance = moments(posterior.table())
    own = distributions.Dirichlet(posterior.phi.detach())
    assert torch.allclose(mean, own.mean)
    assert torch.allclose(covariance.diagonal(), own.variance)
    assert (covariance[~torch.eye(5, dtype=torch.bool)] < 0).all()
    draws = posterior.sample(20000, torch.Generator().manual_seed(0)).detach()
    assert torch.allclose(torch.cov(draws.T), covariance, atol=2e-3)
    other = LogisticNormal(5, 2.0, 1)
    with torch.no_grad():
        other.factor.copy_(torch.tensor([[2.0, 2.0, -2.0, -2.0, 0.0]]))  # the first two rise and fall together
    table = correlation(moments(other.table())[1])
    assert float(table[0, 1]) > 0.3 > 0 > float(table[0, 2])


def test_draws_have_the_gradient_of_their_distribution():
    """d E[s_0] / d phi_0 from implicit gradients of the draws, against the formula of the mean."""
    posterior = Dirichlet(4, 2.0, None)
    with torch.no_grad():
        posterior.v.copy_(torch.tensor([-0.5, 0.5, 1.0, 0.0]))
    (wanted,) = torch.autograd.grad(posterior.mean()[0], [posterior.v])
    (found,) = torch.autograd.grad(posterior.sample(40000, torch.Generator().manual_seed(1)).mean(0)[0], [posterior.v])
    assert torch.allclose(found, wanted, atol=5e-3)


@pytest.mark.parametrize("variant", ["point", "integral"])
@pytest.mark.parametrize("place", ["consumed", "output"])
def test_the_loss_s_gradient_is_right(variant, place):
    bench = bench_of()
    gates = SwitchTraining(switches_with(variant=variant, place=place, draws=2).options, bench, [GROUP])
    batch = next(bench.loader.batches([bench.ids[:5]]))
    posterior = gates.posteriors[0]
    assert isinstance(posterior, Dirichlet)

    def loss(v: torch.Tensor) -> torch.Tensor:
        posterior.v = v  # type: ignore[assignment]
        return gates.loss(bench.model, batch.images, batch.labels, batch.ids).mean()

    v = (torch.linspace(-0.5, 1.5, 16, dtype=torch.float64)).requires_grad_(True)
    for parameter in bench.model.parameters():
        parameter.requires_grad_(False)
    # a gamma variable moves with its shape by the implicit gradient, not along a fixed seed: only the mean is
    # differenced
    if variant == "point":
        assert torch.autograd.gradcheck(loss, (v,), eps=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(loss(v), [v])
    assert grad.isfinite().all()
    assert float(grad.norm()) > 1e-6


def test_the_tail_on_copies_is_the_network_on_each_draw():
    """Logits of every draw and image, in order: against one full pass for each draw."""
    bench = bench_of()
    gates = SwitchTraining(switches_with(variant="integral", draws=3, kl_weight=0.0).options, bench, [GROUP])
    batch = next(bench.loader.batches([bench.ids[:5]]))
    with torch.no_grad():
        found = gates.loss(bench.model, batch.images, batch.labels, batch.ids)
        samples = gates.posteriors[0].sample(3, bench.generator("switches", GROUP, 0)) * 16
        logits = []
        for sample in samples:
            y = bench.model.get_submodule("layer1.0.conv2").register_forward_pre_hook(
                lambda m, x, s=sample: (x[0] * s[:, None, None],)
            )
            logits.append(bench.model(batch.images))
            y.remove()
    expected = functional.cross_entropy(torch.stack(logits).mean(0), batch.labels, reduction="none")
    assert torch.allclose(found, expected)
    mixed = quirks.mixed_images(torch.cat(logits), 3)
    assert torch.equal(mixed.transpose(0, 1)[1], torch.cat(logits)[3:6]), "three rows in a row are not one image's"
    assert not torch.allclose(log_mean(mixed, batch.labels, "logits"), expected)
    mean_of_losses = torch.stack([functional.cross_entropy(x, batch.labels, reduction="none") for x in logits]).mean(0)
    assert torch.allclose(log_mean(torch.stack(logits), batch.labels, "losses"), mean_of_losses)
    assert (mean_of_losses >= expected).all(), "Jensen"


def test_the_divergence_counts_once_and_by_its_scale():
    bench = bench_of()
    batch = next(bench.loader.batches([bench.ids[:5]]))

    def added(**options) -> float:
        losses = []
        for weight in (0.0, options.pop("kl_weight", 1.0)):
            gates = SwitchTraining(switches_with(start=-1.0, kl_weight=weight, **options).options, bench, [GROUP])
            gates.step = options.get("step", 0)
            losses.append(gates.loss(bench.model, batch.images, batch.labels, batch.ids).mean())
        return float((losses[1] - losses[0]).detach())

    kl = float(Dirichlet(16, 2.0, -1.0).kl().detach())
    assert added() == pytest.approx(kl / tiny.IMAGES)
    assert added(kl_weight=3.0, kl_scale="batch") == pytest.approx(3 * kl / 16)
    assert added(kl_epochs=4) == pytest.approx(kl / tiny.IMAGES / 4)
    at_mean = float(dirichlet_kl(torch.full((16,), 1 / 16).double(), 2.0))
    assert added(quirks=("kl_at_mean",)) == pytest.approx(at_mean / tiny.IMAGES)


def tables_on(ranks: Communicator, options: dict) -> dict[str, list]:
    found = switches_with(**options).score(bench_of(ranks))
    return {name: table.tolist() for name, table in found.items()}


INTEGRAL = {"variant": "integral", "epochs": 2, "draws": 2}


@pytest.mark.parametrize("options", [{"epochs": 2}, INTEGRAL, INTEGRAL | {"posterior": "logistic_normal"}], ids=str)
def test_one_at_a_time_every_world_finds_the_same_bits(options, pool):
    found = [tables for world in (1, 3) for tables in pool.run(world, tables_on, options)]
    assert all(tables == found[0] for tables in found)
    assert len(set(found[0][f"{GROUP}:posterior"][0])) == 16


@pytest.mark.parametrize("options", [{"jointly": True}, INTEGRAL | {"jointly": True}], ids=str)
def test_all_at_once_worlds_agree_to_rounding(options, pool):
    """Global batch and noise do not depend on the ranks; sums of gradients are added in another order."""
    one, *others = (tables for world in (1, 2) for tables in pool.run(world, tables_on, options))
    for tables in others:
        for name, table in tables.items():
            assert torch.allclose(torch.tensor(table), torch.tensor(one[name]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"epochs": 3}, {"jointly": True, "optimizer": "adam", **INTEGRAL}], ids=str)
def test_stopped_within_the_training_and_resumed_is_never_stopped(options, tmp_path, monkeypatch):
    whole = switches_with(**options).score(bench_of())
    plain, polls = preemption.poll, iter(range(100))
    with monkeypatch.context() as patched, pytest.raises(preemption.PreemptedError, match="in fit"):
        patched.setattr(preemption, "poll", lambda ranks, also=(): [int(next(polls) == 3), *plain(ranks, also)[1:]])
        switches_with(**options).score(bench_of(partial=tmp_path))
    seen = []
    bench = bench_of(partial=tmp_path)
    batches = bench.loader.batches
    bench.loader.batches = lambda dealt, augment=None: seen.append(len(list(dealt))) or batches(dealt, augment)
    found = switches_with(**options).score(bench)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    steps = 3 * options["epochs"] * (1 if options.get("jointly") else 2)
    assert 0 < sum(seen) < steps, "what was done is not done again"


def test_switches_learn_which_channels_matter():
    """Two copies of the useful half: channels whose consumer reads nothing of them sink."""
    bench = bench_of()
    with torch.no_grad():
        bench.model.get_submodule("layer1.0.conv2").weight[:, 8:] *= 0.01  # type: ignore[index,operator,union-attr]
    found = switches_with(epochs=12, lr=0.5).score(bench)
    table = found[f"{GROUP}:posterior"][0]
    assert float(table[:8].std()) > 3 * float(table[8:].std()), "those that nothing reads stay at the prior"


def test_report_rows_and_portraits():
    method, bench = switches_with(epochs=1), bench_of()
    scores = method.score(bench)
    request = SelectionRequest(keep_ratio=0.5)
    rows = method.table(scores, bench.graph, request)
    assert [row["group"] for row in rows] == ["conv1", GROUP]
    assert all(row["correlation_to"] < 0 and row["positive_percent"] == 0 for row in rows)
    assert all(row["smallest_gate"] < 1 < row["largest_gate"] for row in rows)
    first = next(iter(method.similarity_maps(scores, bench.graph, request)))
    assert first.kept.sum() == 8
    assert "0 % of the pairs positive" in first.caption
    other = switches_with(variant="integral", posterior="logistic_normal", draws=1)
    row = other.table(other.score(bench_of()), bench.graph, request)[0]
    assert row["correlation_to"] > row["correlation_from"]


def test_the_released_program_s_departures():
    bench = bench_of()
    plain, released = (switches_with(**o).score(bench) for o in ({}, {"fidelity": "as_released"}))
    assert not torch.equal(plain[f"{GROUP}:posterior"], released[f"{GROUP}:posterior"]), "batch statistics"
    request = SelectionRequest(keep_ratio=0.5)
    kept = switches_with().select(plain, bench.graph, request).kept(GROUP)
    turned = switches_with(quirks=("reversed_ranking",)).select(plain, bench.graph, request).kept(GROUP)
    assert not set(kept) & set(turned)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="covariance is only seen by draws"):
        dirichlet.Options(posterior="logistic_normal")
    with pytest.raises(PruneError, match=r"(method.lr: the switches|not finite)"):
        switches_with(lr=1e6, kl_weight=1e6, optimizer="sgd", epochs=3).score(bench_of())


def test_the_released_switch_net_of_lenet_drops_half_behind_its_norms():
    """As released on LeNet-5 alone; the masks come from the seed, the step and the image."""
    bench = lenet_bench()
    plain, released = (
        dirichlet.DirichletSwitches(dirichlet.Options(batch=6, quirks=quirks, **more))  # type: ignore[arg-type]
        for quirks, more in (((), {}), (("dropout",), {}))
    )
    gates = SwitchTraining(released.options, bench, ["conv1"])
    assert gates.dropped == ["bn1", "bn2"]
    ids = torch.tensor([3, 1, 9])
    maps = torch.ones(3, 20, 4, 4, dtype=torch.float64)
    masks = gates._dropout_masks(ids)("bn2", maps)
    assert set(masks.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < float((masks == 0).double().mean()) < 0.6
    assert torch.equal(gates._dropout_masks(ids[[2, 0, 1]])("bn2", maps), masks[[2, 0, 1]]), "whoever has the image"
    twice = gates._dropout_masks(ids)("bn2", maps.repeat(2, 1, 1, 1))
    assert twice.shape[0] == 6
    assert not torch.equal(twice[:3], twice[3:]), "each draw of the switches has its own"
    scores = [method.score(lenet_bench())["conv1:posterior"] for method in (plain, released, released)]
    assert torch.equal(scores[1], scores[2])
    assert not torch.allclose(scores[0], scores[1])
    draws = {"fidelity": "as_released", "variant": "integral", "draws": 2, "batch": 6}
    found = dirichlet.DirichletSwitches(dirichlet.Options.model_validate(draws)).score(lenet_bench())
    assert bool(found["conv2:posterior"].isfinite().all())
    other = tiny.bench(tiny.network())
    assert SwitchTraining(dirichlet.Options(fidelity="as_released"), other, ["conv1"]).dropped == []
