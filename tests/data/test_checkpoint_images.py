"""Augmented images of a checkpoint: exactly the file's once they are normalised, and what is refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from dist_prune.cli import main as cli
from dist_prune.data import checkpoint_images
from dist_prune.data.datasets import DatasetKeys, open_source
from dist_prune.errors import PruneError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.fixture
def pixels():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.arange(6) % 2


@pytest.fixture
def files(pixels, tmp_path):
    images, labels = pixels
    floats = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    floats = (floats - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    body = {"state_dict": {"w": torch.ones(1)}, "test_dataset": TensorDataset(floats), "last_epoch_imgs": floats}
    torch.save({**body, "last_epoch_labels": torch.from_numpy(labels)}, tmp_path / "a.pth")
    aug = {"last_train_aug_data": [floats[:4], floats[4:]], "last_train_aug_label": [labels[:4], labels[4:]]}
    torch.save({"state_dict": body["state_dict"], **aug}, tmp_path / "b.pth")
    np.savez(tmp_path / "test.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    return floats


@pytest.mark.parametrize("name", ["a.pth", "b.pth"])
def test_normalised_again_they_are_those_of_the_file(name, files, pixels, tmp_path):
    images, labels = checkpoint_images.read_augmented(tmp_path / name, MEAN, STD)
    assert np.array_equal(images, pixels[0])
    assert np.array_equal(labels, pixels[1])
    again = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    assert torch.equal(again, files)


def test_both_splits(files, tmp_path):
    keys = DatasetKeys({"mean": MEAN, "std": STD}, splits=("train", str(tmp_path / "test.npz")))
    train, test = (
        open_source("checkpoint", str(tmp_path / "a.pth"), "train", is_train, dataset=keys)
        for is_train in (True, False)
    )
    assert (len(train.labels), len(test.labels), train.classes) == (6, 2, test.classes)


def test_what_does_not_fit_is_refused(files, tmp_path):
    with pytest.raises(PruneError, match="no pixels of 0 to 255"):
        checkpoint_images.read_augmented(tmp_path / "a.pth", None, None)
    torch.save({"state_dict": {}}, tmp_path / "none.pth")
    with pytest.raises(PruneError, match="no augmented images"):
        checkpoint_images.read_augmented(tmp_path / "none.pth", MEAN, STD)
    with pytest.raises(PruneError, match=r"data\.eval_split: 'val' is no \.npz file"):
        open_source("checkpoint", str(tmp_path / "a.pth"), "val", False)


def test_a_recipe_checks(files, tmp_path, capsys):
    words = [
        "data={source: checkpoint}", f"data.root={tmp_path / 'a.pth'}", f"data.eval_split={tmp_path / 'test.npz'}",
        f"data.mean={list(MEAN)}", f"data.std={list(STD)}", "backbone={name: resnet8p_cifar, kwargs: {img_size: 8}}",
        "target=", "select.threshold=0.7",
    ]  # fmt: skip
    assert cli.main(["check", "quickstart", *words]) == 0, capsys.readouterr().err
    assert "2 classes" in capsys.readouterr().out
