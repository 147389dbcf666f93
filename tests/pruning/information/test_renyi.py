"""Entropies, widths, binning: the vectors of the specification's section 8.5, and what has to hold of any estimate."""

import math

import pytest
import torch

from dist_prune.errors import PruneError
from dist_prune.pruning.information import bandwidth, binned_estimator
from dist_prune.pruning.information.aligned_estimators import AlignedEstimator
from dist_prune.pruning.information.estimators import AdditiveEstimator
from dist_prune.pruning.information.renyi import (
    distances,
    gaussian_kernel,
    kernel_entropy,
    label_kernel,
    pairs_to_square,
    renyi_entropy,
)
from tests.support.activations import vectors

N = 8
EXACT = {"rtol": 0, "atol": 1e-9}


def near(value, *wanted):
    found = torch.as_tensor(value, dtype=torch.float64).flatten()
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), **EXACT), found.tolist()


@pytest.fixture
def table():
    return distances(vectors())


def test_distances_and_the_scaled_rule(table):
    near(table[0, 0], 0.7452864477437)
    near(table.sum(0)[0], 1.7018543656571)
    near(2 * table.sum(0).sqrt().sum() / N**2, 3.0496059581554)
    near(bandwidth.scaled_rule(8, 12), 3.0419179726692)
    near(bandwidth.scaled_rule(8, 3), 1.2869088042712)
    for n, d, sigma in ((100, 1, 0.3981), (100, 64, 7.4762), (256, 49, 6.3046), (256, 100352, 316.77)):
        assert bandwidth.scaled_rule(n, d) == pytest.approx(sigma, abs=6e-3 if d > 1000 else 6e-5)


@pytest.mark.parametrize(
    ("alpha", "bits"),
    [(0.5, 2.0663721347), (1, 1.6396382351), (1.01, 1.6337871460), (2, 1.2738151455), (5, 0.9606225429)],
)
def test_entropy_of_all_features(table, alpha, bits):
    kernel = gaussian_kernel(table.sum(0), bandwidth.scaled_rule(8, 12))
    assert float(kernel_entropy(kernel, N, alpha)) == pytest.approx(bits, abs=2e-10)
    single = float(kernel_entropy(kernel.float(), N, alpha))
    assert single == pytest.approx(bits, abs=1e-5)


H = {1.01: (1.961815902, 1.952590071, 2.076747497, 1.983797888)}
REST = {1.01: (2.768830109, 2.769716024, 2.743386775, 2.813383552)}
JOINT = {1.01: 2.8775544641, 2: 2.7830440392}
INFORMATION = {
    1.01: (1.853091547, 1.844751631, 1.942579808, 1.919626976),
    2: (1.472587461, 1.442368135, 1.536403367, 1.559816105),
}


@pytest.mark.parametrize("alpha", [1.01, 2])
def test_common_width(table, alpha):
    estimator = AdditiveEstimator(vectors(), torch.ones(4), "mi_rest", range(4), alpha)
    estimator.begin(range(4))
    assert float(estimator.joint([0])) == pytest.approx(JOINT[alpha], abs=1e-9)
    near(estimator.score(range(4)), *INFORMATION[alpha])
    if alpha in H:
        near(estimator.alone(range(4)), *H[alpha])
        near(kernel_entropy(gaussian_kernel(table.sum(0) - table, 1.0), N, alpha), *REST[alpha])
        estimator.remove([2])
        found = estimator.score([0, 1, 3])
        assert torch.allclose(found, torch.tensor([1.684189, 1.733808, 1.835956], dtype=torch.float64), atol=5e-7)


def test_single_precision_is_good_to_1e_5():
    estimator = AdditiveEstimator(vectors(), torch.ones(4), "mi_rest", range(4), 1.01, dtype=torch.float32)
    estimator.begin(range(4))
    wanted = torch.tensor(INFORMATION[1.01], dtype=torch.float64)
    assert torch.allclose(estimator.score(range(4)), wanted, atol=1e-5, rtol=0)


def test_the_paper_s_alignment(table):
    reference = gaussian_kernel(table.sum(0), bandwidth.scaled_rule(8, 12))
    sigmas = bandwidth.align_bandwidths(table, reference, N)
    assert torch.allclose(sigmas, torch.tensor([2.461724, 2.438967, 2.395418, 2.343469]).double(), atol=5e-7)
    estimator = AlignedEstimator(vectors(), sigmas, "mi_rest", range(4), 1.01, reference=reference)
    estimator.begin(range(4))
    remainders = estimator.search_bandwidths(range(4))
    assert torch.allclose(remainders, torch.tensor([3.673006, 3.812614, 3.765761, 3.687950]).double(), atol=5e-7)
    estimator.set_bandwidths(range(4), remainders)
    near(estimator.score(range(4)), 0.520312696, 0.432778584, 0.462700873, 0.544333627)


def test_the_narrower_kernel_is_a_smaller_width(table):
    """exp(-D^2 / s^2) is what was aligned; the paper's evaluation kernel is sqrt 2 wider (quirk wider_kernel)."""
    reference = gaussian_kernel(table.sum(0), 3.0)
    sigmas = bandwidth.align_bandwidths(table, reference, N)
    narrow = AlignedEstimator(vectors(), sigmas, "joint", range(4), 2, reference=reference, halved=False)
    wide = AlignedEstimator(vectors(), sigmas, "joint", range(4), 2, reference=reference)
    for estimator in (narrow, wide):
        estimator.begin(range(4))
        estimator.set_bandwidths([0], torch.tensor([2.0]))
    near(narrow.score([0]), float(kernel_entropy(gaussian_kernel(table[1:].sum(0), 2.0 / math.sqrt(2)), N, 2)))
    assert float(wide.score([0])) < float(narrow.score([0]))


def test_labels(table):
    labels = label_kernel(torch.arange(8) % 3)
    for alpha, hy, shared in (
        (1.01, 1.561055917, (0.620554, 0.650235, 0.751394, 0.619301)),
        (2, 1.540568381, (0.348155, 0.385068, 0.478945, 0.336226)),
    ):
        near(kernel_entropy(labels, N, alpha), hy)
        estimator = AdditiveEstimator(vectors(), torch.ones(4), "relevance", range(4), alpha, labels)
        estimator.begin(range(4))
        assert torch.allclose(estimator.relevance(range(4)), torch.tensor(shared).double(), atol=6e-7)


@pytest.mark.parametrize(("classes", "unlike"), [(4, 0.00012), (10, 0.116), (100, 0.972), (1000, 0.9997)])
def test_a_softmax_of_one_hot_labels_makes_classes_alike(classes, unlike):
    kernel = label_kernel(torch.tensor([0, 1, 1]), softmax_over=classes)
    assert float(kernel[0]) == pytest.approx(unlike, rel=5e-3, abs=6e-6)
    assert float(kernel[2]) == 1


def test_total_correlation(table):
    kernels = gaussian_kernel(table, 1.0)
    for alpha, bits in ((1.01, 5.0973968939), (2, 3.8592551062)):
        whole = float(kernel_entropy(kernels, N, alpha).sum() - kernel_entropy(kernels.prod(0), N, alpha))
        assert whole == pytest.approx(bits, abs=1e-9)


def test_bins():
    values = torch.tanh(vectors())
    assert binned_estimator.bin_codes(values[:, 0, 0]).tolist() == [15, 23, 26, 25, 20, 10, 5, 4]
    bins = binned_estimator.bin_codes(values[:, :, :1])
    estimator = binned_estimator.BinnedEstimator(bins, torch.arange(8) % 3, "mi_rest", range(4))
    estimator.begin(range(4))
    near(estimator.score(range(4)), 3.0, 2.5, 2.5, 3.0)


def test_bins_by_brute_force():
    """The sum of hashes against tuples, and I(Z_k; rest) as the sum over the rest's cells."""
    generator = torch.Generator().manual_seed(0)
    bins = torch.randint(0, 3, (60, 5, 2), generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    estimator = binned_estimator.BinnedEstimator(bins, labels, "cmi_label", range(5))
    estimator.begin(range(5))
    estimator.remove([3])

    def h(*columns):
        rows = [tuple(row) for row in torch.cat([c.reshape(60, -1) for c in columns], 1).tolist()]
        shares = [rows.count(row) / 60 for row in set(rows)]
        return -sum(share * math.log2(share) for share in shares)

    y, whole = labels[:, None], bins[:, [0, 1, 2, 4]]
    for k in (0, 1, 2, 4):
        rest = bins[:, [j for j in (0, 1, 2, 4) if j != k]]
        near(estimator.alone([k]), h(bins[:, k]))
        near(estimator.score([k]), -(h(whole) + h(rest, y) - h(rest) - h(whole, y)))
        near(estimator.relevance([k]), h(bins[:, k]) + h(y) - h(bins[:, k], y))


def test_saturated_values_share_a_bin_with_what_is_above_all_edges_in_the_released_program():
    """code = (bucketize - 1) mod 30: specification, section 9."""
    values = torch.tensor([-7.0, -1.0, -0.99, 0.0, 0.93, 0.94, 1.0, 1.01, 5.0])
    assert binned_estimator.bin_codes(values).tolist() == [1, 1, 1, 15, 28, 29, 29, 29, 29]
    assert binned_estimator.top_bin(values).tolist() == [29, 29, 0, 14, 27, 28, 28, 29, 29]
    edges = torch.linspace(-1, 1, 30, dtype=torch.float64)
    some = torch.linspace(-1.2, 1.2, 1001, dtype=torch.float64)
    assert torch.equal(binned_estimator.top_bin(some), (torch.bucketize(some, edges) - 1) % 30)


def test_what_saturates_on_both_sides_is_told_apart():
    """A filter that is -1 or 1 has an entropy in the released program too; of -1 and 5 it has none."""
    for high, bits in ((1.0, 1.0), (5.0, 0.0)):
        values = torch.tensor([-1.0, high] * 4)[:, None, None]
        estimator = binned_estimator.BinnedEstimator(
            binned_estimator.top_bin(values), torch.arange(8) % 2, "mi_rest", [0]
        )
        near(estimator.alone([0]), bits)


def test_bounds_of_entropies():
    generator = torch.Generator().manual_seed(1)
    table = distances(torch.randn(40, 2, 4, dtype=torch.float64, generator=generator))
    a, b = gaussian_kernel(table, 1.5)
    last = math.inf
    for alpha in (0.5, 0.99, 1, 1.01, 2, 3, 4, 5):
        one, two, both = (float(kernel_entropy(k, 40, alpha)) for k in (a, b, a * b))
        assert 0 <= one <= math.log2(40) + 1e-12
        assert max(one, two) - 1e-12 <= both <= one + two + 1e-12
        assert one <= last + 1e-12, "it does not grow with alpha"
        last = one
        assert float(kernel_entropy(a * a, 40, alpha)) >= one, "a variable beside its copy tells more: 9.3"
    ones = torch.ones(40 * 39 // 2, dtype=torch.float64)
    for alpha in (0.5, 1, 1.01, 2):
        assert float(kernel_entropy(ones, 40, alpha)) == pytest.approx(0, abs=1e-6)
        assert float(kernel_entropy(0 * ones, 40, alpha)) == pytest.approx(math.log2(40), abs=1e-9)


@pytest.mark.parametrize("alpha", [2, 3, 4])
def test_closed_forms_are_the_spectra(alpha):
    table = distances(vectors()).sum(0)
    values = torch.linalg.eigvalsh(pairs_to_square(gaussian_kernel(table, 1.0), N, 1.0) / N)
    spectrum = float(torch.log2((values**alpha).sum()) / (1 - alpha))
    assert float(renyi_entropy(pairs_to_square(gaussian_kernel(table, 1.0), N, 1.0), alpha)) == pytest.approx(
        spectrum, abs=1e-6
    )
    assert float(kernel_entropy(gaussian_kernel(table, 1.0), N, alpha)) == pytest.approx(spectrum, abs=1e-6)


def test_an_order_that_is_not_positive_is_refused():
    with pytest.raises(PruneError, match="alpha"):
        renyi_entropy(torch.eye(3), 0)


def test_smoothing_goes_by_the_order_of_the_batches():
    found = bandwidth.smooth_over_batches([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])])
    assert float(found) == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4)


def test_widths_from_the_data():
    """Of points on a line: the median, and the mean distance to the 10 (here 4) nearest others."""
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
    table = distances(torch.stack([x, torch.zeros(5).double()], 1)[:, :, None])
    squares = sorted((a - b) ** 2 for i, a in enumerate(x.tolist()) for b in x.tolist()[:i])
    found = bandwidth.median_bandwidth(table, 5)
    assert float(found[0]) == pytest.approx(math.sqrt(squares[4] / 2))
    assert float(found[1]) == 1
    nearest = sum(abs(a - b) for a in x.tolist() for b in x.tolist()) / 20
    assert float(bandwidth.nearest_neighbour_bandwidth(table, 5)[0]) == pytest.approx(nearest)


def test_the_multiplier_reaches_the_entropy_asked_for():
    generator = torch.Generator().manual_seed(2)
    halves = [distances(torch.randn(50, 6, 4, dtype=torch.float64, generator=generator)).sum(0) / 2 for _ in range(3)]
    for share in (0.5, 0.75, 0.95):
        factor = bandwidth.entropy_multiplier(halves, 50, 1.01, share)
        found = [float(kernel_entropy(torch.exp(-factor * e), 50, 1.01)) for e in halves]
        assert sum(found) / 3 == pytest.approx(share * math.log2(50), abs=1e-6)
    assert bandwidth.entropy_multiplier([torch.zeros(3)], 3, 1.01, 0.75) == 1


def test_coarse_alignment_finds_almost_the_same_width(table):
    reference = gaussian_kernel(table.sum(0), 3.0)
    fine, coarse = (
        bandwidth.align_bandwidths(table, reference, N),
        bandwidth.align_bandwidths(table, reference, N, 0, bandwidth.BandwidthGrid(coarse=True)),
    )
    assert torch.allclose(fine, coarse, rtol=0.1)
