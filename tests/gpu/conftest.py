"""Tests on a real GPU: skipped, with the reason, where there is none.

DIST_PRUNE_GPU_TESTS=cpu runs on the CPU what does not need the card itself: it proves the tests, not the GPU.
"""

import os

import pytest
import torch

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The first GPU, with float32 products in full precision."""
    if os.environ.get("DIST_PRUNE_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def card(gpu) -> torch.device:
    """The same, for what a CPU cannot stand in for."""
    if gpu.type == "cpu":
        pytest.skip("needs the card itself")
    return gpu


@pytest.fixture(scope="session")
def pair(gpu, tmp_path_factory):
    """Two gloo ranks that share the one GPU."""
    pool = Pool(2, tmp_path_factory.mktemp("gpu_pool"))
    yield pool
    pool.close()
