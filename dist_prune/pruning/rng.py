"""Seeded random generators: the same numbers whatever torch's global random state is."""

import hashlib
from typing import Any

import torch


def seeded_generator(seed: int, *name: Any) -> torch.Generator:
    """A generator (CPU) from a seed and a name."""
    key = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
