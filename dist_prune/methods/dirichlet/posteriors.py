"""Distributions over the simplex that say how much of a layer each channel is worth, and their distance to a prior.

C channels; the prior is Dir(alpha, ..., alpha).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_SHAPE = 1e-3  # of a gamma variable: smaller ones underflow
DRAWS = 4096  # for moments that have no formula


def dirichlet_kl(phi: Tensor, alpha: float) -> Tensor:
    """KL(Dir(phi) || Dir(alpha, ..., alpha)) of (C,) shapes."""
    total, prior = phi.sum(), torch.full_like(phi, alpha)
    constants = torch.lgamma(total) - torch.lgamma(phi).sum() - torch.lgamma(prior.sum()) + torch.lgamma(prior).sum()
    return constants + ((phi - alpha) * (torch.digamma(phi) - torch.digamma(total))).sum()


def inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


class Dirichlet:
    """Dir(phi), phi = softplus(v): every two channels compete, their covariance is negative."""

    def __init__(self, width: int, alpha: float, start: float | None):
        """``start``: of every v; None starts at the prior."""
        self.alpha = alpha
        value = inverse_softplus(alpha) if start is None else start
        self.v = nn.Parameter(torch.full((width,), value, dtype=torch.float64))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.v]

    @property
    def phi(self) -> Tensor:
        return functional.softplus(self.v).clamp(min=LEAST_SHAPE)

    def mean(self) -> Tensor:
        """(C,) posterior mean, with gradient."""
        return self.phi / self.phi.sum()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, C) draws; the gradient is the gamma variables' implicit one, a function of shape and draw alone."""
        gamma = torch._standard_gamma(self.phi.expand(count, -1), generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        return gamma / gamma.sum(1, keepdim=True).clamp(min=torch.finfo(gamma.dtype).tiny)

    def kl(self) -> Tensor:
        return dirichlet_kl(self.phi, self.alpha)

    def table(self) -> Tensor:
        """(1, C) phi: what ``moments`` reads."""
        return self.phi.detach()[None].clone()


class LogisticNormal:
    """softmax(z), z normal with mean mu and covariance diag(d) + U U^T: channels may rise and fall together.

    The prior is the normal that the Dirichlet's logits have by the Laplace approximation: mean 0, variance
    (1 / alpha) (1 - 1 / C) of each.
    """

    def __init__(self, width: int, alpha: float, rank: int):
        self.variance = (1 - 1 / width) / alpha
        zeros = torch.zeros(rank + 1, width, dtype=torch.float64)
        self.mu, self.factor = nn.Parameter(zeros[0].clone()), nn.Parameter(zeros[1:].clone())  # factor: U^T
        self.rho = nn.Parameter(torch.full_like(zeros[0], inverse_softplus(self.variance)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.mu, self.rho, self.factor]

    @property
    def diagonal(self) -> Tensor:
        return functional.softplus(self.rho).clamp(min=1e-8)

    def mean(self) -> Tensor:
        """(C,) the softmax of mu: the centre, not quite the mean."""
        return self.mu.softmax(0)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, C) draws, reparametrised."""
        return _softmax_normal(self.mu, self.diagonal, self.factor, count, generator)

    def kl(self) -> Tensor:
        """Between the normals of the logits, which is the one between the two distributions on the simplex up to the
        logits' common shift; the log-determinant by the matrix determinant lemma."""
        d, u, tau = self.diagonal, self.factor, self.variance
        small = torch.eye(len(u), dtype=u.dtype) + (u / d) @ u.T
        log_det = d.log().sum() + torch.linalg.slogdet(small)[1]
        trace = d.sum() + (u**2).sum() + (self.mu**2).sum()
        return 0.5 * (trace / tau - len(d) + len(d) * math.log(tau) - log_det)

    def table(self) -> Tensor:
        """(2 + rank, C) mu, d and U^T."""
        return torch.cat([self.mu[None], self.diagonal[None], self.factor]).detach().clone()


Posterior = Dirichlet | LogisticNormal


def _softmax_normal(mu: Tensor, d: Tensor, factor: Tensor, count: int, generator: torch.Generator) -> Tensor:
    own = torch.randn((count, len(mu)), generator=generator, dtype=mu.dtype)
    common = torch.randn((count, len(factor)), generator=generator, dtype=mu.dtype)
    return (mu + own * d.sqrt() + common @ factor).softmax(1)


def moments(table: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) mean and (C, C) covariance of a posterior by its ``table``: in closed form for the Dirichlet, of DRAWS
    draws of a fixed generator for the logistic normal."""
    if len(table) == 1:
        phi, total = table[0], table[0].sum()
        mean = phi / total
        return mean, (torch.diag(mean) - mean[:, None] * mean[None]) / (total + 1)
    draws = _softmax_normal(table[0], table[1], table[2:], DRAWS, torch.Generator().manual_seed(0))
    return draws.mean(0), torch.cov(draws.T)


def correlation(covariance: Tensor) -> Tensor:
    """(C, C) from a covariance."""
    deviation = covariance.diagonal().clamp(min=1e-300).sqrt()
    return covariance / (deviation[:, None] * deviation[None])


def log_mean(logits: Tensor, labels: Tensor, over: str) -> Tensor:
    """(B,) loss of each image from (S, B, K) logits of S draws: cross-entropy of the mean logits, or its mean over
    draws (the expected log-likelihood of the evidence bound)."""
    if over == "logits":
        return functional.cross_entropy(logits.mean(0), labels, reduction="none")
    samples: Sequence[Tensor] = [functional.cross_entropy(each, labels, reduction="none") for each in logits]
    return torch.stack(list(samples)).mean(0)
