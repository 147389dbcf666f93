"""Judges whose rests have kernels of their own: the paper's aligned widths, and the released program's polynomials."""

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
    """The paper's estimator: every rest gets a width of its own, aligned to the kernel of the whole unpruned layer
    (section 8.1, mode C). The joint of a filter and its rest is the product of their two kernels.

    Args:
        anchor: pairs of the kernel that widths are aligned to.
        batch: number of this batch: the search is coarser behind the 20th.
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
        self.reference, self.batch, self.grid = reference.to(self.x.device, self.dtype), batch, grid

    def begin(self, remaining: Sequence[int]) -> None:
        super().begin(remaining)
        self.total_squared = torch.zeros(len(self.reference), dtype=torch.float64, device=self.x.device)
        for start in range(0, len(self.remaining), CHUNK):
            for row in self.squared(self.remaining[start : start + CHUNK]):
                self.total_squared += row
        self.bandwidth_of: dict[int, float] = {}

    def remove(self, gone: Iterable[int]) -> None:
        gone = list(gone)
        super().remove(gone)
        for row in self.squared(gone):
            self.total_squared -= row
        self.total_squared.clamp_(min=0)
        self.bandwidth_of = {}

    def remainder_squared(self, k: int) -> Tensor:
        """(pairs,) squared distances of what is left without k; of everything for WHOLE."""
        if k == ALL_REMAINING:
            return self.total_squared.to(self.dtype)
        return (self.total_squared - self.squared([k])[0]).clamp_(min=0).to(self.dtype)

    def search_bandwidths(self, channels: Sequence[int]) -> Tensor:
        return bandwidth.align_bandwidths(
            torch.stack([self.remainder_squared(k) for k in channels]), self.reference, self.n, self.batch, self.grid
        )

    def set_bandwidths(self, channels: Sequence[int], sigmas: Tensor) -> None:
        self.bandwidth_of.update(zip(channels, sigmas.tolist(), strict=True))

    def remainder_kernel(self, k: int) -> Tensor:
        return torch.exp(self.remainder_squared(k) / (-(2.0 if self.halved else 1.0) * self.bandwidth_of[k] ** 2))

    def joint(self, channels: Sequence[int]) -> Tensor:
        return (
            self._kernel_entropy(self.remainder_kernel(ALL_REMAINING), self.n, self.alpha)
            .double()
            .expand(len(channels))
        )

    def score(self, channels: Sequence[int]) -> Tensor:
        """mi_rest: I(Z_k; Z_rest); mi_all: I(Z_R; Z_rest); joint: H(Z_rest)."""
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
    """Kernels (1 + x y)^2 of sets of filters, joints by products; a deprecated option of the released program."""

    def __init__(self, x: Tensor, criterion: Criterion, own: Sequence[int], alpha: float):
        super().__init__(criterion, own)
        self.x, self.alpha = x, alpha

    def _products(self, channels: Sequence[int]) -> Tensor:
        flat = self.x[:, list(channels)].flatten(1)
        return flat @ flat.T

    def _kernel(self, channels: Sequence[int]) -> Tensor:
        return (1 + self._products(channels)) ** 2

    def alone(self, channels: Sequence[int]) -> Tensor:
        return torch.stack([renyi_entropy(self._kernel([k]), self.alpha) for k in channels]).double()

    def relevance(self, channels: Sequence[int]) -> Tensor:
        raise PruneError("the polynomial kernel has no label kernel beside it")

    def joint(self, channels: Sequence[int]) -> Tensor:
        return renyi_entropy(self._kernel(self.remaining), self.alpha).double().expand(len(channels))

    def score(self, channels: Sequence[int]) -> Tensor:
        """mi_rest: I(Z_k; Z_rest). joint: S(Z_rest)."""
        out = []
        for k in channels:
            variable, remainder = self._kernel([k]), self._kernel([j for j in self.remaining if j != k])
            if self.criterion == "joint":
                out.append(renyi_entropy(remainder, self.alpha).double())
                continue
            terms = [renyi_entropy(m, self.alpha) for m in (variable, remainder, variable * remainder)]
            out.append((terms[0] + terms[1] - terms[2]).double())
        return torch.stack(out)
