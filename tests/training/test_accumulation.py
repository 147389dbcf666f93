"""Accumulation: every rank cuts its share into as many pieces, none too small, and exchanges gradients in the last."""

import itertools

import numpy as np
import pytest
from torch.nn.parallel import DistributedDataParallel

from dist_prune.data import sampling
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.training.engine import TrainEngine
from tests.training.test_training import digest, still, trainer


def wrapped(ranks: Communicator, batch: int, accumulate: int) -> list[float]:
    """Trained by torch's own DDP, which exchanges nothing but what its last piece says."""
    found = still(trainer(ranks, batch=batch, accumulate=accumulate, images=72))
    model = DistributedDataParallel(found.model, process_group=ranks.group) if ranks.world > 1 else found.model

    def driven(optimizer, body):
        return TrainEngine(found.loop.environment, optimizer, found.model, model)

    found._make_engine = driven  # type: ignore[method-assign]
    found.run()
    return digest(found.model)


@pytest.mark.parametrize(("world", "batch"), [(2, 18), (3, 20)])
def test_ranks_stay_together_whatever_their_share(world, batch, pool):
    """18 images on 2 ranks: torch's chunk(8) makes 5 pieces of 9; 20 on 3: ranks have 7, 7 and 6."""
    one = wrapped(Communicator(), batch, 1)
    for found in pool.run(world, wrapped, batch, 8):
        assert found == pytest.approx(one, rel=1e-9, abs=1e-9)


def test_every_piece_of_a_batch_that_is_allowed_has_two_images():
    refused = 0
    for count, batch, world, accumulate in itertools.product((4, 5, 6, 9, 23, 36), (2, 3, 4, 9), (1, 2, 3), (1, 3, 8)):
        shares = [
            [len(ids) for ids, _ in sampling.epoch_batches(count, batch, 0, 0, rank, world)] for rank in range(world)
        ]  # by rank, by step
        wholes = [whole for _, whole in sampling.epoch_batches(count, batch, 0, 0, 0, world)]
        assert min(wholes) == sampling.smallest_batch(count, batch)
        try:
            sampling.check_batch_size(batch, count, world, "train")
        except PruneError:
            refused += 1
            assert min(min(found) for found in shares) < 2
            continue
        for step, whole in enumerate(wholes):
            pieces = sampling.accumulation_steps(whole, accumulate, world)
            assert pieces <= accumulate
            sizes = [len(part) for found in shares for part in np.array_split(np.arange(found[step]), pieces)]
            assert min(sizes) >= 2
    assert refused
