"""Estimators whose remainders have kernels of their own: the paper's aligned bandwidths, and polynomial kernels.

The remainder of channel k is the remaining set R without k. Section numbers are those of the entropy specification.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.information import bandwidth
from dist_prune.pruning.information.estimators import (
    ALL_REMAINING,
    CHUNK,
    Criterion,
    EntropyEstimator,
    GaussianEstimator,
)
from dist_prune.pruning.information.renyi import renyi_entropy


class AlignedEstimator(GaussianEstimator):
    """The paper's estimator: each remainder gets a bandwidth aligned to a reference kernel (section 8.1, mode C).

    The reference is the kernel of the whole unpruned layer (section 3.2). The joint kernel of a channel and its
    remainder is the product of their two kernels.

    Args:
        args: positional arguments of ``GaussianEstimator``.
        reference: (pairs,) of the reference kernel.
        batch: number of this batch, from 0; later batches try fewer bandwidths.
        grid: bandwidths to try.
        kwargs: keyword arguments of ``GaussianEstimator``.
    """

    def __init__(
        self,
        *args: Any,
        reference: Tensor,
        batch: int = 0,
        grid: bandwidth.BandwidthGrid = bandwidth.PAPER,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.reference = reference.to(self.x.device, self.dtype)
        self.batch = batch
        self.grid = grid

    def begin(self, remaining: Sequence[int]) -> None:
        """See ``EntropyEstimator.begin``."""
        super().begin(remaining)
        self.total_squared = torch.zeros(len(self.reference), dtype=torch.float64, device=self.x.device)
        for start in range(0, len(self.remaining), CHUNK):
            for row in self.squared(self.remaining[start : start + CHUNK]):
                self.total_squared += row
        self.bandwidth_of: dict[int, float] = {}

    def remove(self, gone: Iterable[int]) -> None:
        """See ``EntropyEstimator.remove``."""
        gone = list(gone)
        super().remove(gone)
        for row in self.squared(gone):
            self.total_squared -= row
        self.total_squared.clamp_(min=0)
        self.bandwidth_of = {}

    def remainder_squared(self, k: int) -> Tensor:
        """(pairs,) squared distances of the remaining set without k; of the whole set for ``ALL_REMAINING``."""
        if k == ALL_REMAINING:
            return self.total_squared.to(self.dtype)
        return (self.total_squared - self.squared([k])[0]).clamp_(min=0).to(self.dtype)

    def search_bandwidths(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.search_bandwidths``."""
        return bandwidth.align_bandwidths(
            torch.stack([self.remainder_squared(k) for k in channels]), self.reference, self.n, self.batch, self.grid
        )

    def set_bandwidths(self, channels: Sequence[int], sigmas: Tensor) -> None:
        """See ``EntropyEstimator.set_bandwidths``."""
        self.bandwidth_of.update(zip(channels, sigmas.tolist(), strict=True))

    def remainder_kernel(self, k: int) -> Tensor:
        """(pairs,) kernel of the remaining set without k, or of the whole set for ``ALL_REMAINING``."""
        return torch.exp(self.remainder_squared(k) / (-(2.0 if self.halved else 1.0) * self.bandwidth_of[k] ** 2))

    def joint(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.joint``."""
        return (
            self._kernel_entropy(self.remainder_kernel(ALL_REMAINING), self.n, self.alpha)
            .double()
            .expand(len(channels))
        )

    def score(self, channels: Sequence[int]) -> Tensor:
        """Criterion of each channel, see ``EntropyEstimator.score``.

        ``mi_rest`` is I(Z_k; Z_(R without k)), ``mi_all`` is I(Z_R; Z_(R without k)), ``joint`` is H(Z_(R without k)).
        """
        out = []
        for k in channels:
            remainder = self.remainder_kernel(k)
            variable = (
                self.remainder_kernel(ALL_REMAINING)
                if self.criterion == "mi_all"
                else torch.exp(-self.exponents([k])[0])
            )
            kernels = [remainder] if self.criterion == "joint" else [variable, remainder, variable * remainder]
            entropies = self._kernel_entropy(torch.stack(kernels), self.n, self.alpha).double()
            out.append(entropies[0] if self.criterion == "joint" else entropies[0] + entropies[1] - entropies[2])
        return torch.stack(out)


class PolynomialEstimator(EntropyEstimator):
    """Estimator with kernels (1 + x y)^2 of sets of channels, joints by products (``p_reyei``, section 4).

    It is a deprecated option of the released program.

    Args:
        x: (n, K, d) activations.
        criterion: see ``EntropyEstimator``.
        own: see ``EntropyEstimator``.
        alpha: order of the Renyi entropy.
    """

    def __init__(self, x: Tensor, criterion: Criterion, own: Sequence[int], alpha: float):
        super().__init__(criterion, own)
        self.x, self.alpha = x, alpha

    def _products(self, channels: Sequence[int]) -> Tensor:
        flat = self.x[:, list(channels)].flatten(1)
        return flat @ flat.T

    def _kernel(self, channels: Sequence[int]) -> Tensor:
        return (1 + self._products(channels)) ** 2

    def alone(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.alone``."""
        return torch.stack([renyi_entropy(self._kernel([k]), self.alpha) for k in channels]).double()

    def relevance(self, channels: Sequence[int]) -> Tensor:
        """Raise a PruneError: there is no label kernel for a polynomial kernel."""
        raise PruneError("there is no label kernel for the polynomial kernel")

    def joint(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.joint``."""
        return renyi_entropy(self._kernel(self.remaining), self.alpha).double().expand(len(channels))

    def score(self, channels: Sequence[int]) -> Tensor:
        """Criterion of each channel, see ``EntropyEstimator.score``.

        ``mi_rest`` is I(Z_k; Z_(R without k)), ``joint`` is H(Z_(R without k)).
        """
        out = []
        for k in channels:
            variable, remainder = self._kernel([k]), self._kernel([j for j in self.remaining if j != k])
            if self.criterion == "joint":
                out.append(renyi_entropy(remainder, self.alpha).double())
                continue
            terms = [renyi_entropy(m, self.alpha) for m in (variable, remainder, variable * remainder)]
            out.append((terms[0] + terms[1] - terms[2]).double())
        return torch.stack(out)
