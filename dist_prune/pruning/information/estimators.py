"""Judges of filters: what one batch of one layer's activations says of each filter, given those that are still there.

A judge answers for some channels (``own``) and follows all deletions. Scores are such that the largest goes first.
Entropies are in bits. Kernels are held by their pairs (renyi.py).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.information import bandwidth
from dist_prune.pruning.information.renyi import distances, kernel_entropy, pairs_to_square, upper_triangle

Criterion = Literal["mi_rest", "mi_all", "joint", "cmi_label", "relevance", "entropy"]
ALL_REMAINING = -1  # in a list of channels: all that are still there
CHUNK = 16  # channels whose distances are made together
SHRINKAGE = 1e-6  # share of the unit matrix in the point where the Shannon entropy's tangent is taken


class EntropyEstimator(ABC):
    """One batch of one variable. ``spectra`` counts the eigenvalue problems that were solved."""

    def __init__(self, criterion: Criterion, own: Sequence[int]):
        self.criterion, self.own = criterion, list(own)
        self.remaining: list[int] = []
        self.spectra_solved = 0

    def begin(self, remaining: Sequence[int]) -> None:
        """Start, or start again, with these channels."""
        self.remaining = list(remaining)

    def remove(self, gone: Iterable[int]) -> None:
        """Channels go."""
        removed = set(gone)
        self.remaining = [k for k in self.remaining if k not in removed]

    @abstractmethod
    def alone(self, channels: Sequence[int]) -> Tensor:
        """H(Z_k) of each channel."""

    @abstractmethod
    def relevance(self, channels: Sequence[int]) -> Tensor:
        """I(Z_k; Y) of each channel."""

    @abstractmethod
    def joint(self, channels: Sequence[int]) -> Tensor:
        """H(Z_R), the same for each of ``channels``."""

    @abstractmethod
    def score(self, channels: Sequence[int]) -> Tensor:
        """The criterion of each channel; the largest goes."""

    def bound(self, channels: Sequence[int]) -> Tensor | None:
        """Numbers that no score exceeds; None where there are none to be had."""
        return None

    def search_bandwidths(self, channels: Sequence[int]) -> Tensor | None:
        """Kernel widths that this batch finds for channels; they are smoothed over batches and come back in settle."""
        return None

    def set_bandwidths(self, channels: Sequence[int], sigmas: Tensor) -> None:
        """The widths to be used for channels."""
        raise NotImplementedError("this judge's widths are fixed")

    def _kernel_entropy(self, kernel: Tensor, n: int, alpha: float) -> Tensor:
        if alpha not in (2, 3, 4):
            self.spectra_solved += kernel[..., 0].numel()
        return kernel_entropy(kernel, n, alpha)


class GaussianEstimator(EntropyEstimator):
    """What judges with Gaussian kernels have in common: distances and label kernel.

    Args:
        x: (n, K, d) activations.
        sigmas: (K,) kernel widths.
        labels: pairs of the label kernel, or None.
        dtype: of all arithmetic; activations may be held in a smaller one.
        halved: kernels exp(-D^2 / 2 sigma^2); else exp(-D^2 / sigma^2).
    """

    def __init__(
        self,
        x: Tensor,
        sigmas: Tensor,
        criterion: Criterion,
        own: Sequence[int],
        alpha: float,
        labels: Tensor | None = None,
        halved: bool = True,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__(criterion, own)
        self.x, self.n, self.alpha, self.halved, self.dtype = x, len(x), alpha, halved, dtype
        self.sigmas = sigmas.to(x.device, dtype)
        self.labels = None if labels is None else labels.to(x.device, dtype)
        self._alone: dict[int, float] = {}
        if criterion in ("cmi_label", "relevance") and labels is None:
            raise PruneError(f"the criterion {criterion} needs labels")

    def squared(self, channels: Sequence[int]) -> Tensor:
        """(len, pairs) of squared distances."""
        return distances(self.x[:, list(channels)].to(self.dtype))

    def exponents(self, channels: Sequence[int]) -> Tensor:
        """(len, pairs) of D^2 / 2 sigma^2 (or D^2 / sigma^2)."""
        factor = (2.0 if self.halved else 1.0) * self.sigmas[list(channels)] ** 2
        return self.squared(channels) / factor[:, None]

    def alone(self, channels: Sequence[int]) -> Tensor:
        new = [k for k in channels if k not in self._alone]
        entropies = [self._kernel_entropy(torch.exp(-u), self.n, self.alpha) for u in self._exponent_chunks(new)]
        self._alone.update(zip(new, [value for chunk in entropies for value in chunk.double().tolist()], strict=True))
        return torch.tensor([self._alone[k] for k in channels], dtype=torch.float64)

    def relevance(self, channels: Sequence[int]) -> Tensor:
        assert self.labels is not None
        joint = [
            self._kernel_entropy(torch.exp(-u) * self.labels, self.n, self.alpha)
            for u in self._exponent_chunks(channels)
        ]
        label = float(kernel_entropy(self.labels, self.n, self.alpha))
        return self.alone(channels) + label - torch.cat(joint).double().cpu()

    def _exponent_chunks(self, channels: Sequence[int]) -> Iterable[Tensor]:
        return (self.exponents(channels[i : i + CHUNK]) for i in range(0, len(channels), CHUNK))


class AdditiveEstimator(GaussianEstimator):
    """Every filter has its own fixed width; kernels of sets are products, so exponents add (section 8.1, mode H).

    E = sum of U_k over what is there; K_R = exp(-E) is the joint of every candidate with its rest, and
    K_(R without k) = exp(-(E - U_k)) = K_R exp(U_k): closed forms and tangent bounds of all candidates are one product
    of a matrix and a vector.
    """

    cached_channels: Sequence[int] = ()  # what the kernels at hand were made for
    realigns: bool = False  # set where widths follow what is still there (width "remain")
    grid = bandwidth.PAPER
    batch = 0

    def begin(self, remaining: Sequence[int]) -> None:
        """The sum is made anew here: what is resumed at this point goes on with the same bits."""
        super().begin(remaining)
        present = set(remaining)
        if present <= set(self.cached_channels):  # their kernels are at hand
            rows = [self.row_of[k] for k in self.own_remaining if k in present]
            self.u = self.u[rows]
        else:
            empty = torch.zeros((0, self.n * (self.n - 1) // 2), dtype=self.dtype, device=self.x.device)
            self.u = torch.cat([empty, *self._exponent_chunks([k for k in self.own if k in present])])
        self.cached_channels = self.remaining
        self.own_remaining = [k for k in self.own if k in present]
        self.row_of = {k: i for i, k in enumerate(self.own_remaining)}
        self.exp_exponents: Tensor | None = None
        self.entropy_bounds = torch.full((len(self.own_remaining),), math.inf, dtype=torch.float64)
        self.e = torch.zeros(self.u.shape[1], dtype=torch.float64, device=self.x.device)
        others = [k for k in self.remaining if k not in self.row_of]
        other_rows = (row for chunk in self._exponent_chunks(others) for row in chunk)
        for k in self.remaining:  # one after the other: the sum does not depend on who holds which
            self.e += self.u[self.row_of[k]] if k in self.row_of else next(other_rows)
        self._joint_kernels: tuple[Tensor, ...] = ()
        self._cached_joints: list[float] = []

    def remove(self, gone: Iterable[int]) -> None:
        gone = list(gone)
        super().remove(gone)
        for k in gone:
            self.e -= self.u[self.row_of[k]] if k in self.row_of else self.exponents([k])[0]
        self.e.clamp_(min=0)
        self._joint_kernels, self._cached_joints = (), []

    @property
    def joint_kernels(self) -> tuple[Tensor, ...]:
        """(K_R,), or (K_R, K_R with the labels); made once a step."""
        if not self._joint_kernels:
            kernel = torch.exp(-self.e).to(self.dtype)
            self._joint_kernels = (kernel,)
            if self.criterion == "cmi_label" and self.labels is not None:
                self._joint_kernels = (kernel, kernel * self.labels)
        return self._joint_kernels

    def joint(self, channels: Sequence[int]) -> Tensor:
        return torch.full((len(channels),), self._joint_entropies()[0], dtype=torch.float64)

    def _joint_entropies(self) -> list[float]:
        if not self._cached_joints:
            self._cached_joints = [
                float(self._kernel_entropy(kernel, self.n, self.alpha)) for kernel in self.joint_kernels
            ]
        return self._cached_joints

    def score(self, channels: Sequence[int]) -> Tensor:
        """mi_rest: I(Z_k; Z_rest). joint: H(Z_rest). cmi_label: minus I(Z_k; Y | Z_rest)."""
        remainder, joints = self._remainder_entropy(channels), self._joint_entropies()
        if self.criterion == "joint":
            return remainder
        if self.criterion == "mi_rest":
            return self.alone(channels) + remainder - joints[0]
        return remainder - self._remainder_entropy(channels, 1) - joints[0] + joints[1]

    def _remainder_entropy(self, channels: Sequence[int], which: int = 0) -> Tensor:
        """H(Z_(R without k)) of each, or with the labels."""
        if len(self.remaining) == 2 and which == 0:
            return self.alone([next(other for other in self.remaining if other != k) for k in channels])
        rows, labels = [self.row_of[k] for k in channels], self.labels
        if self.alpha == 2 and self._in_range(2):
            power = self.joint_kernels[which].double() ** 2
            total = self._products(power.to(self.dtype), 2)[rows].double()
            return -torch.log2((self.n + 2 * total) / self.n**2).cpu()
        entropies = []
        for row in rows:
            kernel = torch.exp(self.u[row] - self.e).clamp_(max=1).to(self.dtype)
            entropies.append(
                self._kernel_entropy(kernel if labels is None or which == 0 else kernel * labels, self.n, self.alpha)
            )
        out = torch.stack(entropies).double().cpu()
        if which == 0:
            self.entropy_bounds[rows] = out
        return out

    def bound(self, channels: Sequence[int]) -> Tensor | None:
        """The tangent of tr A^alpha at A = K_R / n, and what was found of a larger rest: it had no less entropy."""
        if self.criterion not in ("mi_rest", "joint") or self.alpha in (2, 3, 4) or not self._in_range(1):
            return None
        values, vectors = torch.linalg.eigh(pairs_to_square(self.joint_kernels[0], self.n, 1.0).double() / self.n)
        self.spectra += 1
        maximum = math.log2(self.n)
        alpha, values = self.alpha, values.clamp(min=0)
        if alpha == 1:
            values = (1 - SHRINKAGE) * values / values.sum() + SHRINKAGE / self.n
            slope, offset = -torch.log2(values), 0.0  # of -sum v log v, less a constant: traces are 1
        else:
            slope, offset = alpha * values ** (alpha - 1), float((1 - alpha) * (values**alpha).sum())
        tangent = (vectors * slope) @ vectors.T
        rows, columns = upper_triangle(self.n, self.x.device)
        weights = (tangent[rows, columns] * self.joint_kernels[0].double()).to(self.dtype)
        tau = offset + (float(tangent.diagonal().sum()) + 2 * self._products(weights, 1).double()) / self.n
        if alpha == 1:
            upper = tau.clamp(max=maximum)
        else:
            edge = self.n ** (1 - alpha)
            tau = tau.clamp(min=edge) if alpha > 1 else tau.clamp(min=1e-300, max=edge)
            upper = torch.log2(tau) / (1 - alpha)
        upper = torch.minimum(upper.cpu(), self.entropy_bounds)[[self.row_of[k] for k in channels]]
        return upper if self.criterion == "joint" else self.alone(channels) + upper - self._joint_entropies()[0]

    def _in_range(self, power: int) -> bool:
        """Whether exp(power E) stays far inside the range of the numbers."""
        return power * float(self.e.max()) < (500 if self.dtype == torch.float64 else 60)

    def _products(self, weights: Tensor, power: int) -> Tensor:
        """sum over pairs of weights exp(power U_k), for every channel held."""
        if self.exp_exponents is None:
            self.exp_exponents = torch.exp(power * self.u)
        return self.exp_exponents @ weights

    def search_bandwidths(self, channels: Sequence[int]) -> Tensor | None:
        if not self.realigns:
            return None
        features = self.x[0, 0].numel() * len(self.remaining)
        whole = torch.zeros(self.u.shape[1], dtype=self.dtype, device=self.x.device)
        for k in self.remaining:
            whole += self.squared([k])[0]
        reference = torch.exp(whole / (-2 * bandwidth.scaled_rule(self.n, features) ** 2))
        return bandwidth.align_bandwidths(self.squared(channels), reference, self.n, self.batch, self.grid)

    def set_bandwidths(self, channels: Sequence[int], sigmas: Tensor) -> None:
        self.sigmas = self.sigmas.clone()  # taps and parts are given the same tensor
        self.sigmas[list(channels)] = sigmas.to(self.sigmas)
        self._alone, self.cached_channels = {}, ()
        self.begin(self.remaining)
