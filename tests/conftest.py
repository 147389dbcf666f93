"""Shared by all tests: thread counts, the pool of ranks, real data where it is."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; without one the hub's client tries for 23 s

import pytest
import torch

from tests.support.pool import Pool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """Three real gloo ranks."""
    pool = Pool(3, tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool4(tmp_path_factory):
    """Four real gloo ranks (slow run)."""
    pool = Pool(4, tmp_path_factory.mktemp("pool4"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pretend(tmp_path_factory):
    """Two ranks of their own for the pretend device, which changes torch in a process for good."""
    pool = Pool(2, tmp_path_factory.mktemp("pretend"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data that DIST_PRUNE_DATA names; where CI has it, its absence is a failure."""
    place = os.environ.get("DIST_PRUNE_DATA")
    if place and Path(place, "cifar10.npz").is_file():
        return Path(place)
    reason = "DIST_PRUNE_DATA names no folder with the real data"
    if os.environ.get("DIST_PRUNE_MUST_RUN"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def ffcv():
    """FFCV's engine; where CI has to have it, its absence is a failure."""
    from dist_prune.data.ffcv.backend import import_loader
    from dist_prune.errors import PruneError

    try:
        return import_loader()
    except PruneError as error:
        if os.environ.get("DIST_PRUNE_MUST_RUN"):
            pytest.fail(str(error))
        pytest.skip(str(error))
