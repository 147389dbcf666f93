"""Every sample once, whatever the world; orders and augmentation from (seed, epoch, sample id) alone."""

import numpy as np
import pytest
import torch

from dist_prune.data import sampling


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "size"), [(53, 7), (8, 8), (5, 50), (1, 1), (1001, 50)])
def test_scoring_deals_each_image_once(count, size, world):
    ids = np.arange(100, 100 + count)
    lists = sampling.micro_batches(ids, size)
    dealt = [part for rank in range(world) for part in sampling.shard(lists, rank, world)]
    assert sorted(np.concatenate(dealt).tolist()) == ids.tolist()
    whole = {tuple(part) for part in lists}
    assert {tuple(part) for part in dealt} == whole, "micro-batches are the same for every world"


@pytest.mark.parametrize("count", [64, 65, 70, 72, 100, 16, 9])
def test_an_epoch_is_the_same_batches_for_every_world(count):
    """Every image once, ragged end included, in the same whole batches; every rank gets at least two images."""
    epochs = []
    for world in (1, 2, 3, 4):
        parts = [list(sampling.epoch_batches(count, 16, 5, 2, rank, world)) for rank in range(world)]
        assert {len(part) for part in parts} == {sampling.steps_per_epoch(count, 16)}
        batches = [np.concatenate([part[step][0] for part in parts]) for step in range(len(parts[0]))]
        assert [len(batch) for batch in batches] == [part[1] for part in parts[0]]
        assert min(len(ids) for part in parts for ids, _ in part) >= 2
        epochs.append([batch.tolist() for batch in batches])
    assert all(epoch == epochs[0] for epoch in epochs)
    assert sorted(i for batch in epochs[0] for i in batch) == list(range(count))
    assert all(8 <= len(batch) < 24 for batch in epochs[0])


def test_epochs_and_seeds_differ():
    orders = {
        tuple(np.concatenate([ids for ids, _ in sampling.epoch_batches(50, 10, seed, number, 0, 1)]).tolist())
        for seed in (0, 1)
        for number in (0, 1)
    }
    assert len(orders) == 4


def test_calibration_ids():
    ids = sampling.calibration_ids(np.arange(1000) % 10, 100, 3)
    assert len(set(ids.tolist())) == 100
    assert ids.tolist() == sorted(ids.tolist())
    assert ids.tolist() == sampling.calibration_ids(np.arange(1000) % 10, 100, 3).tolist()
    assert ids.tolist() != sampling.calibration_ids(np.arange(1000) % 10, 100, 4).tolist()
    assert sampling.calibration_ids(np.arange(10), "all", 0).tolist() == list(range(10))
    assert sampling.calibration_ids(np.arange(10), 99, 0).tolist() == list(range(10))


def test_calibration_sets_balanced_over_classes():
    """As many of each class, but for a rest and for classes that have too few; the rest is not always the first."""
    labels = np.random.default_rng(0).permutation(
        np.repeat(np.arange(10), [5, 100, 100, 100, 100, 100, 100, 100, 100, 195])
    )
    more_of = set()
    for images in (40, 47, 200):
        for seed in range(4):
            ids = sampling.calibration_ids(labels, images, seed, "class")
            assert (
                ids.tolist()
                == sorted(set(ids.tolist()))
                == sampling.calibration_ids(labels, images, seed, "class").tolist()
            )
            counts = np.bincount(labels[ids], minlength=10)
            assert counts.sum() == images
            assert counts[1:].max() - counts[1:].min() <= 1
            assert counts[0] == 5 if images == 200 else counts[0] in (4, 5)
            more_of.add(tuple(np.flatnonzero(counts == 5)) if images == 47 else ())
    assert len(more_of) == 5
    assert len(sampling.calibration_ids(labels, "all", 0, "class")) == len(labels)


def test_draws_belong_to_the_sample():
    ids = np.arange(2000)
    whole = sampling.uniform_from_ids(1, 2, ids, 3)
    assert torch.equal(whole[[7, 3, 1999]], sampling.uniform_from_ids(1, 2, np.array([7, 3, 1999]), 3))
    assert float(whole.min()) >= 0
    assert float(whole.max()) < 1
    assert abs(float(whole.mean()) - 0.5) < 0.02
    assert abs(float(whole.std()) - 12**-0.5) < 0.02
    assert not torch.equal(whole, sampling.uniform_from_ids(1, 3, ids, 3))
    correlation = np.corrcoef(whole.numpy().T)
    assert np.abs(correlation - np.eye(3)).max() < 0.08
