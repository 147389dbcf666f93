"""Entropy estimators: information of one batch of a layer's activations about each filter, given the remaining set.

Z_k is the activation of channel k, R the remaining set, Z_R the activations of all its channels. An estimator is asked
for its own channels and follows all removals. Scores are such that the largest is removed first. Entropies are in bits.
Kernels are given by their pairs (see renyi.py). Section numbers are those of the entropy specification.
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
ALL_REMAINING = -1  # in a list of channels: the whole remaining set
CHUNK = 16  # channels whose distances are computed at once
SHRINKAGE = 1e-6  # weight of the unit matrix at the point of the Shannon entropy's tangent


class EntropyEstimator(ABC):
    """Entropies of one batch of activations at one hook point.

    Args:
        criterion: score of a channel, see ``score``.
        own: channels for which the estimator is asked; other ranks have the others.

    Attributes:
        remaining: the remaining set R, in ascending order of ``begin``.
        spectra_solved: number of eigenvalue problems solved so far.
    """

    def __init__(self, criterion: Criterion, own: Sequence[int]):
        self.criterion, self.own = criterion, list(own)
        self.remaining: list[int] = []
        self.spectra_solved = 0

    def begin(self, remaining: Sequence[int]) -> None:
        """Start, or start again, with a remaining set.

        Args:
            remaining: its channels.
        """
        self.remaining = list(remaining)

    def remove(self, gone: Iterable[int]) -> None:
        """Remove channels from the remaining set.

        Args:
            gone: channels of the remaining set, also those of other estimators.
        """
        removed = set(gone)
        self.remaining = [k for k in self.remaining if k not in removed]

    @abstractmethod
    def alone(self, channels: Sequence[int]) -> Tensor:
        """Entropy H(Z_k) of each channel.

        Args:
            channels: own channels.

        Returns:
            (len(channels),) float64 in bits, on the CPU.
        """

    @abstractmethod
    def relevance(self, channels: Sequence[int]) -> Tensor:
        """Mutual information I(Z_k; Y) of each channel with the labels Y.

        Args:
            channels: own channels.

        Returns:
            (len(channels),) float64 in bits, on the CPU.

        Raises:
            PruneError: the estimator has no label kernel.
        """

    @abstractmethod
    def joint(self, channels: Sequence[int]) -> Tensor:
        """Joint entropy H(Z_R) of the remaining set, repeated for each of ``channels``.

        Args:
            channels: own channels, or ``ALL_REMAINING``.

        Returns:
            (len(channels),) float64 in bits, on the CPU.
        """

    @abstractmethod
    def score(self, channels: Sequence[int]) -> Tensor:
        """Criterion of each channel (specification, section 4); the channel with the largest is removed.

        Args:
            channels: own channels of the remaining set.

        Returns:
            (len(channels),) float64 in bits, on the CPU.
        """

    def bound(self, channels: Sequence[int]) -> Tensor | None:
        """Upper bounds of ``score``; None if there are none for this criterion or these kernels.

        Args:
            channels: own channels of the remaining set.

        Returns:
            (len(channels),) float64 in bits, on the CPU, or None.
        """
        return None

    def search_bandwidths(self, channels: Sequence[int]) -> Tensor | None:
        """Find the bandwidths of this batch for kernels that change with the remaining set.

        They are gathered over the batches, smoothed, and returned by ``set_bandwidths``.

        Args:
            channels: own channels of the remaining set; ``ALL_REMAINING`` is the remaining set as one variable.

        Returns:
            (len(channels),) float64, or None if bandwidths are fixed.
        """
        return None

    def set_bandwidths(self, channels: Sequence[int], sigmas: Tensor) -> None:
        """Use these bandwidths from now on.

        Args:
            channels: as in ``search_bandwidths``.
            sigmas: (len(channels),) float64.
        """
        raise NotImplementedError("the bandwidths of this estimator are fixed")

    def _kernel_entropy(self, kernel: Tensor, n: int, alpha: float) -> Tensor:
        if alpha not in (2, 3, 4):
            self.spectra_solved += kernel[..., 0].numel()
        return kernel_entropy(kernel, n, alpha)


class GaussianEstimator(EntropyEstimator):
    """Base of estimators with Gaussian kernels: distances, kernels of single channels, label kernel.

    Args:
        x: (n, K, d) activations of n samples, K channels, d features each.
        sigmas: (K,) bandwidths.
        criterion: see ``EntropyEstimator``.
        own: see ``EntropyEstimator``.
        alpha: order of the Renyi entropy.
        labels: pairs of the label kernel, or None.
        halved: kernels are exp(-D^2 / (2 sigma^2)); False: exp(-D^2 / sigma^2).
        dtype: of all arithmetic; activations may be kept in a smaller one.

    Raises:
        PruneError: the criterion needs labels and there are none.
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
        self.x = x
        self.n = len(x)
        self.alpha = alpha
        self.halved = halved
        self.dtype = dtype
        self.sigmas = sigmas.to(x.device, dtype)
        self.labels = None if labels is None else labels.to(x.device, dtype)
        self._alone: dict[int, float] = {}
        if criterion in ("cmi_label", "relevance") and labels is None:
            raise PruneError(f"the criterion {criterion} needs labels")

    def squared(self, channels: Sequence[int]) -> Tensor:
        """(len(channels), pairs) squared distances."""
        return distances(self.x[:, list(channels)].to(self.dtype))

    def exponents(self, channels: Sequence[int]) -> Tensor:
        """(len(channels), pairs) exponents D^2 / (2 sigma^2), or D^2 / sigma^2 without ``halved``."""
        factor = (2.0 if self.halved else 1.0) * self.sigmas[list(channels)] ** 2
        return self.squared(channels) / factor[:, None]

    def alone(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.alone``."""
        new = [k for k in channels if k not in self._alone]
        entropies = [self._kernel_entropy(torch.exp(-u), self.n, self.alpha) for u in self._exponent_chunks(new)]
        self._alone.update(zip(new, [value for chunk in entropies for value in chunk.double().tolist()], strict=True))
        return torch.tensor([self._alone[k] for k in channels], dtype=torch.float64)

    def relevance(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.relevance``."""
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
    """Estimator with a fixed bandwidth for each channel (section 8.1, mode H).

    Kernels of sets are Hadamard products, so exponents U_k add: E = sum of U_k over R. K_R = exp(-E) is the joint
    kernel of every candidate k with the others, and K_(R without k) = exp(-(E - U_k)) = K_R exp(U_k). Closed forms and
    tangent bounds of all candidates are then one product of a matrix and a vector.

    Attributes:
        realigns: whether bandwidths are searched again for each remaining set (width ``remain``).
        grid: of that search.
        batch: number of the batch, from 0, for that search.
    """

    cached_channels: Sequence[int] = ()  # the set for which the exponents ``u`` were computed
    realigns: bool = False
    grid = bandwidth.PAPER
    batch = 0

    def begin(self, remaining: Sequence[int]) -> None:
        """See ``EntropyEstimator.begin``. E is summed anew, so an elimination that resumes here has the same bits."""
        super().begin(remaining)
        present = set(remaining)
        if present <= set(self.cached_channels):  # their exponents are cached
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
        for k in self.remaining:  # in this order, so the sum does not depend on the split into shards
            self.e += self.u[self.row_of[k]] if k in self.row_of else next(other_rows)
        self._joint_kernels: tuple[Tensor, ...] = ()
        self._cached_joints: list[float] = []

    def remove(self, gone: Iterable[int]) -> None:
        """See ``EntropyEstimator.remove``."""
        gone = list(gone)
        super().remove(gone)
        for k in gone:
            self.e -= self.u[self.row_of[k]] if k in self.row_of else self.exponents([k])[0]
        self.e.clamp_(min=0)
        self._joint_kernels, self._cached_joints = (), []

    @property
    def joint_kernels(self) -> tuple[Tensor, ...]:
        """(K_R,), or (K_R, K_R times the label kernel) for ``cmi_label``; computed once for each remaining set."""
        if not self._joint_kernels:
            kernel = torch.exp(-self.e).to(self.dtype)
            self._joint_kernels = (kernel,)
            if self.criterion == "cmi_label" and self.labels is not None:
                self._joint_kernels = (kernel, kernel * self.labels)
        return self._joint_kernels

    def joint(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.joint``."""
        return torch.full((len(channels),), self._joint_entropies()[0], dtype=torch.float64)

    def _joint_entropies(self) -> list[float]:
        if not self._cached_joints:
            self._cached_joints = [
                float(self._kernel_entropy(kernel, self.n, self.alpha)) for kernel in self.joint_kernels
            ]
        return self._cached_joints

    def score(self, channels: Sequence[int]) -> Tensor:
        """Criterion of each channel, see ``EntropyEstimator.score``.

        ``mi_rest`` is I(Z_k; Z_(R without k)), ``joint`` is H(Z_(R without k)), ``cmi_label`` is
        -I(Z_k; Y | Z_(R without k)).
        """
        remainder, joints = self._remainder_entropy(channels), self._joint_entropies()
        if self.criterion == "joint":
            return remainder
        if self.criterion == "mi_rest":
            return self.alone(channels) + remainder - joints[0]
        return remainder - self._remainder_entropy(channels, 1) - joints[0] + joints[1]

    def _remainder_entropy(self, channels: Sequence[int], which: int = 0) -> Tensor:
        """H(Z_(R without k)) of each channel; with ``which`` = 1, jointly with the labels."""
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
        """Upper bounds of ``score`` from the tangent of tr A^alpha at A = K_R / n (section 8.2).

        An entropy found earlier for a larger set is a bound too: removing channels does not increase it.

        Args:
            channels: own channels of the remaining set.

        Returns:
            (len(channels),) float64 in bits, or None for closed-form orders and for exponents out of range.
        """
        if self.criterion not in ("mi_rest", "joint") or self.alpha in (2, 3, 4) or not self._in_range(1):
            return None
        values, vectors = torch.linalg.eigh(pairs_to_square(self.joint_kernels[0], self.n, 1.0).double() / self.n)
        self.spectra_solved += 1
        maximum = math.log2(self.n)
        alpha, values = self.alpha, values.clamp(min=0)
        if alpha == 1:
            values = (1 - SHRINKAGE) * values / values.sum() + SHRINKAGE / self.n
            slope, offset = -torch.log2(values), 0.0  # of -sum v log v, without a constant: traces are 1
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
        """Whether exp(power E) stays far inside the range of the dtype."""
        return power * float(self.e.max()) < (500 if self.dtype == torch.float64 else 60)

    def _products(self, weights: Tensor, power: int) -> Tensor:
        """Sum over pairs of weights times exp(power U_k), for each own remaining channel."""
        if self.exp_exponents is None:
            self.exp_exponents = torch.exp(power * self.u)
        return self.exp_exponents @ weights

    def search_bandwidths(self, channels: Sequence[int]) -> Tensor | None:
        """See ``EntropyEstimator.search_bandwidths``. The reference is the kernel of R (section 3.4)."""
        if not self.realigns:
            return None
        features = self.x[0, 0].numel() * len(self.remaining)
        total = torch.zeros(self.u.shape[1], dtype=self.dtype, device=self.x.device)
        for k in self.remaining:
            total += self.squared([k])[0]
        reference = torch.exp(total / (-2 * bandwidth.scaled_rule(self.n, features) ** 2))
        return bandwidth.align_bandwidths(self.squared(channels), reference, self.n, self.batch, self.grid)

    def set_bandwidths(self, channels: Sequence[int], sigmas: Tensor) -> None:
        """See ``EntropyEstimator.set_bandwidths``."""
        self.sigmas = self.sigmas.clone()  # other taps and shards may share the tensor
        self.sigmas[list(channels)] = sigmas.to(self.sigmas)
        self._alone, self.cached_channels = {}, ()
        self.begin(self.remaining)
