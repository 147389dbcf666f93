"""Tests on a real GPU: skipped, with the reason, where there is none."""

import pytest
import torch

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The first GPU, with float32 products in full precision."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def pair(gpu, tmp_path_factory):
    """Two gloo ranks that share the one GPU."""
    pool = Pool(2, tmp_path_factory.mktemp("gpu_pool"))
    yield pool
    pool.close()
