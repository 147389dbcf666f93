"""Batches of a user's loader: torchvision's targets, unequal in number, become one table."""

import pytest
import torch

from dist_prune.data.sample_loader import SampleLoader, split_batch
from dist_prune.errors import PruneError
from tests.support import tiny

IMAGES = [torch.rand(3, 20, 30) for _ in range(2)]
BOX, NONE = torch.tensor([[1.0, 2.0, 11.0, 12.0]]), torch.zeros(0, 4)


def target(boxes, *labels, **more):
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), **more}


def test_unequal_targets_are_collated():
    both = torch.cat([BOX, BOX + 5])
    images, table = split_batch((IMAGES, [target(both, 2, 1, iscrowd=torch.tensor([0, 1])), target(NONE)]), "boxes")
    assert images.shape == (2, 3, 20, 30)
    assert table.tolist() == [
        [[1, 1, 2, 11, 12, 0], [0, 6, 7, 16, 17, 1]],
        [[-1, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0]],
    ]
    assert split_batch((torch.stack(IMAGES), None), "boxes")[1] is None
    assert torch.equal(split_batch((torch.stack(IMAGES), table), "boxes")[1], table)


def test_batches_of_a_list_may_have_other_numbers_of_boxes():
    few, many = [target(BOX, 1), target(NONE)], [target(torch.cat([BOX] * 3), 1, 2, 1), target(BOX, 2)]
    batches, comm = [(IMAGES, few), (IMAGES, many)], tiny.machine().comm
    loader = SampleLoader(batches, comm, torch.device("cpu"), torch.float32, "boxes")
    (batch,) = loader.batches([loader.ids])
    assert batch.labels.shape == (4, 3, 6)
    assert (batch.labels[..., 0] >= 0).sum(1).tolist() == [1, 0, 3, 1]


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (
            (IMAGES, [target(BOX, 0), target(NONE)]),
            "has the label 0; labels of torchvision's detectors are counted",
        ),
        ((IMAGES, [target(BOX + 15, 1), target(NONE)]), r"the box 16, 17, 26, 27 .* in an image of 30x20 pixels"),
        ((IMAGES, [target(BOX.flip(1), 1), target(NONE)]), "or has no area"),
        ((IMAGES, [target(BOX, 1, 2), target(NONE)]), "has 1 boxes and labels of"),
        ((IMAGES, [BOX, NONE]), "a target of the loader is a Tensor; a batch is"),
        ((IMAGES, [target(NONE)]), r"are \(1, 0, 6\) for 2 images|are \(1, 1, 6\) for 2 images"),
        (([torch.rand(3, 4, 4), torch.rand(3, 5, 4)], []), "images have several sizes"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), []), "the loader's images are torch.uint8"),
        ((IMAGES, "boxes"), "the loader's targets are a str"),
    ],
)
def test_other_forms_are_refused(batch, text):
    with pytest.raises(PruneError, match=text):
        split_batch(batch, "boxes")
