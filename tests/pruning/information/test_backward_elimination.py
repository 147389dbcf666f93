"""Backward elimination: the specification's orders, brute force, bounds, ties, and what must not move an order."""

import math

import pytest
import torch

from dist_prune.pruning.information import bandwidth
from dist_prune.pruning.information.aligned_estimators import AlignedEstimator
from dist_prune.pruning.information.backward_elimination import (
    Elimination,
    EliminationState,
    EstimatorBank,
    one_shot_order,
    ordinals,
)
from dist_prune.pruning.information.estimators import AdditiveEstimator
from dist_prune.pruning.information.group_samples import EstimatorConfig, GroupSamples
from dist_prune.pruning.information.renyi import distances, gaussian_kernel, kernel_entropy
from tests.support.activations import mixtures, vectors


def make_samples(x, batch, labels=None, taps=1, **estimator) -> GroupSamples:
    labels = torch.arange(len(x)) % 5 if labels is None else labels
    batches = [torch.arange(i, i + batch) for i in range(0, len(x) - batch + 1, batch)]
    return GroupSamples("layer", [x + 0.01 * i for i in range(taps)], labels, batches, EstimatorConfig(**estimator))


def combined_bandwidths(s: GroupSamples) -> list:
    return [
        s.combine_bandwidths([s.batch_bandwidths(tap, batch) for batch in range(len(s.batches))])
        for tap in range(len(s.taps))
    ]


def eliminate(
    s: GroupSamples, rule: Elimination | None = None, steps: int = 64, **bank
) -> tuple[EliminationState, EstimatorBank]:
    found = s.estimator_bank(combined_bandwidths(s), **bank)
    alone = found.sum_over_batches("alone", range(s.width)).sum(0)
    state = EliminationState(s.width)
    while not state.done:
        state = (rule or Elimination()).advance(found, alone, state, steps)
    return state, found


def order_of(x, criterion, alpha) -> EliminationState:
    bank = EstimatorBank(4, 1, 1, lambda tap, batch, own: AdditiveEstimator(x, torch.ones(4), criterion, own, alpha))
    return Elimination().advance(bank, bank.sum_over_batches("alone", range(4))[0], EliminationState(4))


def test_the_specification_s_orders():
    first, second = order_of(vectors(), "mi_rest", 1.01), order_of(vectors(), "mi_rest", 2)
    assert first.order[:2] == [2, 3]
    assert first.scores[2] == pytest.approx(1.318861, abs=5e-7)
    assert first.order[2] == 1, "an exact tie at two: the smaller entropy goes"
    assert second.order[:2] == [3, 2]
    assert second.scores[2] == pytest.approx(0.856899, abs=5e-7)
    assert order_of(vectors(), "joint", 1.01).order == order_of(vectors(), "joint", 2).order == [3, 0, 1, 2]
    assert first.joints[0] == pytest.approx(2.8775544641, abs=1e-9)


def test_the_paper_s_estimator_deletes_3_first():
    x, n = vectors(), 8
    reference = gaussian_kernel(distances(x).sum(0), bandwidth.scaled_rule(8, 12))
    sigmas = bandwidth.align_bandwidths(distances(x), reference, n)
    make_estimator = lambda tap, batch, own: AlignedEstimator(x, sigmas, "mi_rest", own, 1.01, reference=reference)  # noqa: E731
    bank = EstimatorBank(4, 1, 1, make_estimator, bandwidths="remainders")
    state = Elimination().advance(bank, bank.sum_over_batches("alone", range(4))[0], EliminationState(4))
    assert state.order[0] == 3
    assert state.scores[0] == pytest.approx(0.544333627, abs=1e-9)


def brute(x, batches, sigma, criterion, alpha, labels) -> list[int]:
    """Explicit concatenations, explicit spectra, no sums of distances."""

    def h(ids, channels, with_labels=False):
        flat = x[ids][:, channels].flatten(1)
        gram = torch.exp(-((flat[:, None] - flat[None]) ** 2).sum(-1) / (2 * sigma**2))
        if with_labels:
            gram = gram * (labels[ids][:, None] == labels[ids][None])
        values = torch.linalg.eigvalsh(gram / len(ids)).clamp(min=0)
        return float(torch.log2((values / values.sum()).pow(alpha).sum()) / (1 - alpha))

    def score(k, kept):
        rest, out = [j for j in kept if j != k], 0.0
        for ids in batches:
            out += h(ids, rest)
            if criterion == "mi_rest":
                out += h(ids, [k]) - h(ids, kept)
            if criterion == "cmi_label":
                out += h(ids, kept, True) - h(ids, rest, True) - h(ids, kept)
        return out

    kept, order = list(range(x.shape[1])), []
    single = [sum(h(ids, [k]) for ids in batches) for k in kept]
    while len(kept) > 1:
        gone = max(kept, key=lambda k: (round(score(k, kept), 7), -single[k], -k))
        order.append(gone)
        kept.remove(gone)
    return order + kept


@pytest.mark.parametrize("criterion", ["mi_rest", "joint", "cmi_label"])
@pytest.mark.parametrize("alpha", [1.01, 2])
def test_products_of_kernels_are_the_concatenation(criterion, alpha):
    x, labels = mixtures(48, 10), torch.arange(48) % 3
    s = make_samples(x, 24, labels, criterion=criterion, alpha=alpha)
    sigma = float(combined_bandwidths(s)[0][0])
    assert eliminate(s)[0].order == brute(x, s.batches, sigma, criterion, alpha, labels)


@pytest.mark.parametrize(("criterion", "alpha", "step"), [
    ("mi_rest", 1.01, 0), ("joint", 1.01, 0), ("mi_rest", 1, 0), ("mi_rest", 0.7, 0), ("mi_rest", 1.01, 0.1),
])  # fmt: skip
def test_best_first_is_exhaustive(criterion, alpha, step):
    s = make_samples(mixtures(80, 40), 40, criterion=criterion, alpha=alpha)
    best, fast = eliminate(s, Elimination(step=step))
    plain, slow = eliminate(s, Elimination(step=step, exhaustive=True))
    assert (best.order, best.scores) == (plain.order, plain.scores)
    assert fast.spectra_solved < 0.7 * slow.spectra_solved


def test_no_score_exceeds_its_bound():
    for target in (0.5, 0.75, 0.95):
        for alpha in (0.7, 1, 1.01, 1.5):
            s = make_samples(mixtures(40, 20), 40, alpha=alpha, target=target)
            estimator = s.estimator_bank(combined_bandwidths(s)).estimator(0, 0)
            estimator.begin(range(20))
            bounds = estimator.bound(range(20))
            assert bounds is not None
            assert bool((bounds >= estimator.score(range(20)) - 1e-10).all())
            assert bool((bounds - estimator.score(range(20)) < 0.5).any()), "and it is not without use"


def test_distances_too_large_for_the_fast_product():
    """Kernels that are almost the unit matrix: exp(E) would overflow, so nothing is factored out."""
    x = 60 * mixtures(30, 6)
    for alpha in (2, 1.01):
        estimator = AdditiveEstimator(x, torch.ones(6), "joint", range(6), alpha)
        estimator.begin(range(6))
        assert float(estimator.e.max()) > 500
        rest = distances(x).sum(0) - distances(x)
        assert torch.allclose(
            estimator.score(range(6)), kernel_entropy(gaussian_kernel(rest, 1.0), 30, alpha), atol=1e-9
        )
        assert estimator.bound(range(6)) is None


@pytest.mark.parametrize("estimator", [
    {}, {"alpha": 2.0}, {"width": "aligned", "alpha": 2.0}, {"width": "remain", "alpha": 2.0}, {"binning": True},
    {"criterion": "cmi_label", "alpha": 2.0}, {"width": "aligned", "criterion": "mi_all", "alpha": 2.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("combine", ["rank", "sum"])
def test_where_the_work_is_done_moves_nothing(estimator, combine):
    """One process, estimators in 1, 2 or 4 shards, candidates one at a time or many; two taps."""
    small = estimator.get("width") is None
    grid = bandwidth.BandwidthGrid(coarse=True)
    s = make_samples(mixtures(60, 12 if small else 6), 20, taps=2, grid=grid, **estimator)
    whole, _ = eliminate(s, Elimination(combine))

    def map_in_reverse(jobs, run):
        return [run(job) for job in reversed(jobs)][::-1]

    for parts, at_once in ((1, 3), (2, 1), (4, 64)):
        state, _ = eliminate(s, Elimination(combine, at_once=at_once), map_jobs=map_in_reverse, shards=parts)
        assert (state.order, state.scores) == (whole.order, whole.scores)


@pytest.mark.parametrize("estimator", [{}, {"alpha": 2.0}, {"binning": True}], ids=str)
def test_stopped_anywhere_it_goes_on_the_same(estimator):
    s = make_samples(mixtures(60, 14), 30, **estimator)
    whole, _ = eliminate(s, steps=5)
    bank = s.estimator_bank(combined_bandwidths(s))
    alone = bank.sum_over_batches("alone", range(s.width)).sum(0)
    state = EliminationState(s.width)
    while not state.done:  # as another process that has the table alone
        state = EliminationState.from_table(s.width, EliminationState.to_table(state))
        state = Elimination().advance(s.estimator_bank(combined_bandwidths(s)), alone, state, 5)
    assert (state.order, state.scores, state.joints) == (whole.order, whole.scores, whole.joints)


def test_permuting_channels_permutes_the_order_and_samples_do_not_matter():
    x, turn = mixtures(40, 12), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    plain = eliminate(make_samples(x, 40))[0].order
    assert [int(turn[k]) for k in eliminate(make_samples(x[:, turn], 40))[0].order] == plain
    shuffled = x[torch.randperm(40, generator=torch.Generator().manual_seed(4))]
    assert eliminate(make_samples(shuffled, 40))[0].order == plain


@pytest.mark.parametrize("criterion", ["joint", "mi_rest"])
@pytest.mark.parametrize("target", [0.5, 0.75])
def test_a_copy_goes_before_independent_filters(criterion, target):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(100, 6, 4, dtype=torch.float64, generator=generator)
        s = make_samples(torch.cat([x, x[:, :1]], 1), 100, criterion=criterion, target=target)
        assert eliminate(s)[0].order[0] in (0, 6)


def test_a_dead_filter_stays_to_the_end_where_nothing_skips_it():
    x = mixtures(40, 6)
    x[:, 2] = 0
    order = eliminate(make_samples(x, 40))[0].order
    assert 2 in order[-2:], "of the last two, which tie, the smaller entropy goes"


def test_reversed_and_static_orders():
    s = make_samples(mixtures(40, 8), 40, alpha=2.0)
    state, bank = eliminate(s, Elimination(rev=True))
    bank.begin(range(8))
    scores = bank.sum_over_batches("score", range(8)).sum(0)
    assert state.order[0] == int(scores.argmin())
    alone = bank.sum_over_batches("alone", range(8)).sum(0)
    assert one_shot_order(bank, "alone", alone).order == alone.argsort().tolist()
    assert one_shot_order(bank, "alone", alone, rev=True).order == alone.argsort(descending=True).tolist()


def test_ordinals_are_places_within_each_tap():
    scores = torch.tensor([[30, 10, 20], [5, 7, 5]])
    assert ordinals(scores, torch.tensor([1, 1, 2])).tolist() == [[3, 1, 2], [2, 3, 1]]


def test_chunks_remove_a_share_at_once():
    s = make_samples(mixtures(40, 30), 40, alpha=2.0)
    state, bank = eliminate(s, Elimination(step=0.2))
    assert sorted(state.order) == list(range(30))
    bank.begin(range(30))
    first = bank.sum_over_batches("score", range(30)).sum(0)
    assert set(state.order[:6]) == set(first.argsort(descending=True)[:6].tolist())
    assert len(set(state.joints)) < 30


def test_saturated_kernels_show():
    x = mixtures(64, 20)
    state, _ = eliminate(make_samples(x, 64, width="fix", alpha=2.0))
    assert state.joints[0] / math.log2(64) > 0.9
    state, _ = eliminate(make_samples(x, 64, width="entropy_target", alpha=2.0))
    assert state.joints[0] / math.log2(64) == pytest.approx(0.75, abs=1e-6)
