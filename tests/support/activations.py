"""Activations that several tests rank."""

import torch
from torch import Tensor


def vectors() -> Tensor:
    """(8, 4, 3) float64: the specification's own, section 8.5."""
    i, k, m = (torch.arange(count, dtype=torch.float64) for count in (8, 4, 3))
    i, k, m = i[:, None, None], k[None, :, None], m[None, None]
    return torch.sin(0.7 * i + 1.3 * k + 0.4 * m) + 0.1 * ((i * k) % 3)


def mixtures(images: int, channels: int, seed: int = 0, features: int = 4) -> Tensor:
    """(n, K, d) float64 behind a ReLU: channels that have something in common, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(images, 6, features, dtype=torch.float64, generator=generator)
    weights = torch.randn(channels, 6, dtype=torch.float64, generator=generator)
    return torch.relu(torch.einsum("nfd,kf->nkd", basis, weights))
