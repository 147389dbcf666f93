"""Posteriors of switches: distributions over the simplex, and their divergence from a prior.

Adamczewski, Park: Dirichlet Pruning for Neural Network Compression, AISTATS 2021. C is the number of channels, the
prior is Dir(alpha, ..., alpha).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_SHAPE = 1e-3  # smallest shape of a gamma variable; draws of smaller ones underflow
DRAWS = 4096  # number of draws for moments without a closed form


def dirichlet_kl(phi: Tensor, alpha: float) -> Tensor:
    """Compute KL(Dir(phi) || Dir(alpha, ..., alpha)), the divergence term of the paper's evidence lower bound; ().

    ln G(sum phi) - sum ln G(phi_c) - ln G(C alpha) + C ln G(alpha) + sum (phi_c - alpha)(psi(phi_c) - psi(sum phi)),
    with the gamma function G and the digamma function psi.

    Args:
        phi: (C,) shapes, positive.
        alpha: shape of the prior.
    """
    total, prior = phi.sum(), torch.full_like(phi, alpha)
    constants = torch.lgamma(total) - torch.lgamma(phi).sum() - torch.lgamma(prior.sum()) + torch.lgamma(prior).sum()
    return constants + ((phi - alpha) * (torch.digamma(phi) - torch.digamma(total))).sum()


def inverse_softplus(value: float) -> float:
    """Compute v with softplus(v) = ``value``, which is positive."""
    return value + math.log(-math.expm1(-value))


class Dirichlet:
    """Dir(phi), phi = softplus(v): every two channels compete, their covariance is negative."""

    def __init__(self, width: int, alpha: float, start: float | None):
        """Start with equal parameters.

        Args:
            width: C.
            alpha: shape of the prior.
            start: first value of every v; None: phi starts at the prior.
        """
        self.alpha = alpha
        value = inverse_softplus(alpha) if start is None else start
        self.v = nn.Parameter(torch.full((width,), value, dtype=torch.float64))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train: v (C,)."""
        return [self.v]

    @property
    def phi(self) -> Tensor:
        """(C,) float64 shapes, with gradient."""
        return functional.softplus(self.v).clamp(min=LEAST_SHAPE)

    def mean(self) -> Tensor:
        """(C,) posterior mean, with gradient."""
        return self.phi / self.phi.sum()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, C) vectors as normalised gamma variables.

        Their gradient is the implicit one of gamma variables, a function of the shape and the draw alone.
        """
        gamma = torch._standard_gamma(self.phi.expand(count, -1), generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        return gamma / gamma.sum(1, keepdim=True).clamp(min=torch.finfo(gamma.dtype).tiny)

    def kl(self) -> Tensor:
        """Compute the divergence from the prior, (), with gradient."""
        return dirichlet_kl(self.phi, self.alpha)

    def table(self) -> Tensor:
        """Copy phi, (1, C), for the score file; ``moments`` reads it."""
        return self.phi.detach()[None].clone()


class LogisticNormal:
    """softmax(z), z normal with mean mu and covariance diag(d) + U U^T: channels may rise and fall together.

    The prior is the normal distribution that approximates the Dirichlet's logits (Laplace): mean 0, variance
    (1 / alpha) (1 - 1 / C) of each logit.
    """

    def __init__(self, width: int, alpha: float, rank: int):
        """Start at the prior.

        Args:
            width: C.
            alpha: shape of the Dirichlet prior.
            rank: columns of U.
        """
        self.variance = (1 - 1 / width) / alpha
        zeros = torch.zeros(rank + 1, width, dtype=torch.float64)
        self.mu, self.factor = nn.Parameter(zeros[0].clone()), nn.Parameter(zeros[1:].clone())  # factor: U^T
        self.rho = nn.Parameter(torch.full_like(zeros[0], inverse_softplus(self.variance)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train: mu (C,), rho (C,) and U^T (rank, C)."""
        return [self.mu, self.rho, self.factor]

    @property
    def diagonal(self) -> Tensor:
        """(C,) d = softplus(rho), with gradient."""
        return functional.softplus(self.rho).clamp(min=1e-8)

    def mean(self) -> Tensor:
        """Compute the softmax of mu, (C,): the centre, which is close to the mean."""
        return self.mu.softmax(0)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, C) vectors, reparametrised."""
        return _softmax_normal(self.mu, self.diagonal, self.factor, count, generator)

    def kl(self) -> Tensor:
        """Compute the divergence from the prior, (), with gradient.

        It is the divergence between the normal distributions of the logits. That of the distributions on the simplex
        differs by the logits' common shift. The log-determinant follows from the matrix determinant lemma.
        """
        d = self.diagonal
        u = self.factor
        tau = self.variance
        small = torch.eye(len(u), dtype=u.dtype) + (u / d) @ u.T
        log_det = d.log().sum() + torch.linalg.slogdet(small)[1]
        trace = d.sum() + (u**2).sum() + (self.mu**2).sum()
        return 0.5 * (trace / tau - len(d) + len(d) * math.log(tau) - log_det)

    def table(self) -> Tensor:
        """Copy mu, d and U^T, (2 + rank, C), for the score file; ``moments`` reads it."""
        return torch.cat([self.mu[None], self.diagonal[None], self.factor]).detach().clone()


Posterior = Dirichlet | LogisticNormal


def _softmax_normal(mu: Tensor, d: Tensor, factor: Tensor, count: int, generator: torch.Generator) -> Tensor:
    own = torch.randn((count, len(mu)), generator=generator, dtype=mu.dtype)
    common = torch.randn((count, len(factor)), generator=generator, dtype=mu.dtype)
    return (mu + own * d.sqrt() + common @ factor).softmax(1)


def moments(table: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (C,) mean and (C, C) covariance of a posterior.

    The Dirichlet's are in closed form, the logistic normal's are those of DRAWS draws of a fixed generator.

    Args:
        table: (1, C) or (2 + rank, C), of the posterior's ``table``.
    """
    if len(table) == 1:
        phi, total = table[0], table[0].sum()
        mean = phi / total
        return mean, (torch.diag(mean) - mean[:, None] * mean[None]) / (total + 1)
    draws = _softmax_normal(table[0], table[1], table[2:], DRAWS, torch.Generator().manual_seed(0))
    return draws.mean(0), torch.cov(draws.T)


def correlation(covariance: Tensor) -> Tensor:
    """Compute the correlation matrix (C, C) of a covariance (C, C)."""
    deviation = covariance.diagonal().clamp(min=1e-300).sqrt()
    return covariance / (deviation[:, None] * deviation[None])


def log_mean(logits: Tensor, labels: Tensor, over: str) -> Tensor:
    """Compute the loss of each image over S draws of the switches, (B,).

    Args:
        logits: (S, B, K).
        labels: (B,) int64.
        over: ``logits``: the cross-entropy of the mean logits, the released program's. ``losses``: the mean
            cross-entropy, minus the expected log-likelihood of the evidence lower bound.
    """
    if over == "logits":
        return functional.cross_entropy(logits.mean(0), labels, reduction="none")
    samples: Sequence[Tensor] = [functional.cross_entropy(each, labels, reduction="none") for each in logits]
    return torch.stack(list(samples)).mean(0)
