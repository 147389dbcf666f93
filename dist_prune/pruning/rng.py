"""Seeded random generators: their numbers do not depend on torch's global random state."""

import hashlib
from typing import Any

import torch


def seeded_generator(seed: int, *name: Any) -> torch.Generator:
    """Make a CPU generator from a seed and a name.

    Args:
        seed: the run's seed.
        name: what the numbers are for, any values with a stable ``repr`` (text, integers). Generators of other names
            are independent.
    """
    key = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
