"""A map-style Dataset as a data source: its forms, its errors before work, the same plan as from arrays."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.data import map_dataset
from dist_prune.data.datasets import DatasetKeys, dataset_shape, open_source
from dist_prune.data.map_dataset import to_pixels
from dist_prune.data.open_split import open_split
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.run import run
from tests.support.launch import report

FILE = """
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, IterableDataset


class Arrays(Dataset):
    def __init__(self, train, form="array", count=400):
        found = load_digits()
        keep = np.arange(len(found["target"])) % 4 != 3
        keep = (keep if train else ~keep) & (np.cumsum(np.ones(len(keep))) <= count)
        self.images = (found["images"] * (255 / 16)).round().astype(np.uint8)[keep]
        self.labels, self.form = found["target"][keep], form

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image, label = self.images[index], self.labels[index]
        return {
            "array": lambda: (image, int(label)),
            "deep": lambda: (image[..., None], label),
            "pil": lambda: (Image.fromarray(image), torch.tensor(label)),
            "bytes": lambda: (torch.from_numpy(image)[None], int(label)),
            "float": lambda: (torch.from_numpy(image)[None] / 255, int(label)),
            "normalised": lambda: (torch.from_numpy(image)[None] / 255 - 0.5, int(label)),
            "halves": lambda: (torch.from_numpy(image)[None] / 511, int(label)),
            "double": lambda: (image.astype(np.float64), int(label)),
            "text": lambda: ("image.png", int(label)),
            "alone": lambda: image,
            "three": lambda: (image, int(label), 1),
            "one_hot": lambda: (image, np.eye(10)[label]),
            "negative": lambda: (image, int(label) - 5),
            "fraction": lambda: (image, float(label)),
            "random": lambda: (image + np.random.randint(2, size=image.shape, dtype=np.uint8), int(label)),
            "sizes": lambda: (image[:8 - index % 2], int(label)),
            "planes": lambda: (image if index else np.stack([image] * 3, -1), int(label)),
            "fails": lambda: 1 / (index - 3),
        }[self.form]()


class Named(Arrays):
    def __init__(self, *, split, classes, **others):
        super().__init__(split == "train", **others)
        self.classes = classes


class Stream(IterableDataset):
    def __init__(self, train):
        pass

    def __iter__(self):
        return iter(())


class Empty(Arrays):
    def __len__(self):
        return 0


def same_for_both(count=5):
    return Arrays(True, count=count)


def no_dataset(train):
    return {"train": train}


VALUE = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("datasets") / "of_a_user.py"
    place.write_text(FILE)
    return str(place)


def opened(source: str, train: bool = True, root: str | None = None, size: int | None = None, **kwargs):
    split = "train" if train else "val"
    return open_source(source, root, split, train, dataset=DatasetKeys(kwargs, size, ("train", "val")))


def npz(file: str, place) -> str:
    arrays = {}
    for train, name in ((True, "train"), (False, "test")):
        source = opened(f"{file}:Arrays", train)
        arrays |= {f"x_{name}": source.images, f"y_{name}": source.labels}
    np.savez(place, **arrays)
    return str(place)


@pytest.mark.parametrize("form", ["array", "deep", "pil", "bytes", "float"])
def test_all_forms_of_the_same_images_are_the_same_data_set_as_the_arrays(file, form, tmp_path):
    for train in (True, False):
        array = open_source("npz", npz(file, tmp_path / "digits.npz"), "", train)
        source = opened(f"{file}:Arrays", train, form=form)
        assert source.identity == array.identity
        assert np.array_equal(source.images, array.images) and np.array_equal(source.labels, array.labels)
        assert source.classes == array.classes and source.in_chans == 1 and source.fixed_size == (8, 8)


def test_images_that_do_not_fit_into_memory_are_read_one_by_one_and_are_the_same(file, monkeypatch):
    whole = opened(f"{file}:Arrays")
    monkeypatch.setattr(map_dataset, "MEMORY", 1000)
    lazy = opened(f"{file}:Arrays")
    assert lazy.images is None and lazy.backends == ("torch",) and lazy.identity == whole.identity
    copy = pickle.loads(pickle.dumps(lazy))  # as for a worker that is started anew
    assert np.array_equal(copy.fetch(7), whole.images[7]) and copy.identity == lazy.identity


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("Arrays", {"form": "normalised"}, r"values from -0\.5 to .*Leave the normalisation to data\.mean"),
        ("Arrays", {"form": "double"}, r"float64 \(8, 8\); it must be a PIL image"),
        ("Arrays", {"form": "text"}, r"a str; it must be a PIL image"),
        ("Arrays", {"form": "alone"}, r"\[0\] is a ndarray; it must be \(image, label\)"),
        ("Arrays", {"form": "three"}, r"is a tuple of 3; it must be \(image, label\)"),
        ("Arrays", {"form": "one_hot"}, r"its label is array\("),
        ("Arrays", {"form": "negative"}, r"its label is -5; labels are class numbers from 0"),
        ("Arrays", {"form": "fraction"}, r"its label is 0\.0"),
        ("Arrays", {"form": "random"}, r"is another image or label when it is read again"),
        ("Arrays", {"form": "sizes"}, r"data\.image_size: .*image 1 is 7 x 8, image 0 is 8 x 8.*data\.image_size=SIDE"),
        ("Arrays", {"form": "planes"}, r"image 1 has 1 channel\(s\), image 0 has 3"),
        ("Arrays", {"form": "fails"}, r"\[0\] is a float|ZeroDivisionError"),
        ("Arrays", {"colour": 1}, r"fails: TypeError: .*colour"),
        ("Named", {"classes": ["a", "b"]}, r"\[7\] has the label 9, but its classes are 2 \(numbers 0 to 1\)"),
        ("Stream", {}, r"IterableDataset|no __len__"),
        ("Empty", {}, r"has no images"),
        ("no_dataset", {}, r"\[0\] fails: KeyError"),
        ("same_for_both", {}, r"takes none of train, split and root \(count\)"),
        ("VALUE", {}, r"is a int; name a class or a function"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_work(file, name, kwargs, said):
    with pytest.raises(PruneError, match=said):
        opened(f"{file}:{name}", **kwargs)


def test_a_root_that_is_not_taken_or_not_there(file, tmp_path):
    with pytest.raises(PruneError, match=r"data\.root: .*Arrays takes no root"):
        opened(f"{file}:Arrays", root=str(tmp_path))
    with pytest.raises(PruneError, match=r"data\.root: there is no .*nowhere/train \(data\.train_split"):
        opened("torchvision.datasets:ImageFolder", root=str(tmp_path / "nowhere"))


def test_values_between_two_levels_are_rounded_and_said(file):
    assert opened(f"{file}:Arrays").note == ""
    assert "rounded" in opened(f"{file}:Arrays", form="halves").note


def test_class_names_and_split_names(file):
    names = [f"digit {n}" for n in range(12)]
    source = opened(f"{file}:Named", classes=names)
    assert source.classes == tuple(names)
    assert opened(f"{file}:Named", False, classes=names).identity == opened(f"{file}:Arrays", False).identity


def test_classes_are_those_of_both_splits(file):
    """The first 12 images: the training split has all ten classes, the evaluation split only 3, 7 and 1."""
    evaluation = opened(f"{file}:Arrays", False, count=12)
    assert len(set(evaluation.labels.tolist())) == 3
    assert evaluation.classes == tuple(map(str, range(10)))


@pytest.mark.parametrize(
    ("mode", "shape"), [("L", (4, 5, 1)), ("RGB", (4, 5, 3)), ("1", (4, 5, 1)), ("RGBA", (4, 5, 3)), ("P", (4, 5, 3))]
)
def test_pillow_s_modes(mode, shape):
    assert to_pixels(Image.new(mode, (5, 4)))[0].shape == shape


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_modes_of_more_than_8_bits_are_refused(mode):
    with pytest.raises(ValueError, match="convert it to 'L' or 'RGB'"):
        to_pixels(Image.new(mode, (5, 4)))


def test_channels_first_arrays_and_channels_last_tensors_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 9, 9\); that is no \(height, width, channels\)"):
        to_pixels(np.zeros((3, 9, 9), np.uint8))
    with pytest.raises(ValueError, match=r"\(9, 9, 3\); that is no \(channels, height, width\)"):
        to_pixels(torch.zeros(9, 9, 3))


def test_images_of_several_sizes_are_resized_and_served_by_workers(file):
    source = opened(f"{file}:Arrays", size=8, form="sizes")
    assert source.fixed_size is None and source.in_chans == 3 and source.images is None
    assert source.fetch(1).shape == (7, 8, 3)
    assert source.identity != opened(f"{file}:Arrays").identity
    recipe = loading.load(
        "quickstart",
        [f"data.source={file}:Arrays", "data.kwargs={form: sizes}", "data.image_size=8", "data.mean=", "data.std="],
        methods.options_of,
    )
    assert dataset_shape(recipe.data) == (10, 3, None)
    split = open_split("auto", f"{file}:Arrays", None, "train", True, dataset=DatasetKeys.of(recipe.data))
    assert split.backend == "torch"


def test_a_recipe_refuses_keywords_for_other_sources_and_unknown_names():
    for words, said in (
        (["data.kwargs={a: 1}"], r"data\.kwargs is for a Dataset"),
        (["data.source=cifar1O"], r"Did you mean 'cifar10'"),
        (["data.source=a:b", "data.layout=nhwc"], r"data\.layout is for"),
    ):
        with pytest.raises(PruneError, match=said):
            loading.load("quickstart", words, methods.options_of)


def test_torchvision_s_own(data, tmp_path):
    """MNIST and ImageFolder with a root; the same images as those of the source mnist."""
    folder = tmp_path / "images"
    for split in ("train", "val"):
        for number in range(3):
            (folder / split / f"class_{number}").mkdir(parents=True)
            for image in range(2):
                pixels = np.random.default_rng(number + 7 * image).integers(0, 256, (6 + number, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class_{number}" / f"{image}.png")
    source = opened("torchvision.datasets:ImageFolder", root=str(folder), size=8)
    assert source.classes == ("class_0", "class_1", "class_2") and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    known = open_source("mnist", str(data), "", False)
    assert opened("torchvision.datasets:MNIST", False, root=str(data)).identity == known.identity


def plan_on_rank(ranks, folder: str, words: tuple[str, ...]) -> None:
    from pathlib import Path

    place = Path(folder)
    recipe = loading.load("quickstart", list(words), methods.options_of)
    run(recipe, place, replace(DistributedEnvironment.single_process(), comm=ranks), until="select")


QUICK = (
    "backbone.name=resnet8p_cifar", "train.epochs=1", "train.warmup_epochs=0", "train.batch=60",
    "score.images=53", "score.micro_batch=7", "method.name=taylor", "target.macs=0.6", "data.augment=none",
)  # fmt: skip


def test_the_same_plan_on_one_two_and_three_ranks_and_from_an_npz(file, pool, tmp_path):
    checkpoint = tmp_path / "dense.safetensors"
    first = tmp_path / "npz"
    words = (*QUICK, "data.source=npz", f"data.root={npz(file, tmp_path / 'digits.npz')}")
    pool.run(1, plan_on_rank, str(first), words)
    (first / "dense.safetensors").rename(checkpoint)
    trained = (*QUICK, f"backbone.checkpoint={checkpoint}", "train.epochs=0")
    plans = []
    for world, source in ((1, "npz"), (1, "code"), (2, "code"), (3, "code")):
        here = (*trained, *words[-2:]) if source == "npz" else (*trained, f"data.source={file}:Arrays")
        pool.run(world, plan_on_rank, str(tmp_path / f"{source}_{world}"), here)
        plans.append((tmp_path / f"{source}_{world}" / "round_1/plan.json").read_text())
    assert len(set(plans)) == 1


def unlike_on_rank(ranks, folder: str, source: str) -> str:
    import os

    os.environ["OTHER_IMAGES"] = str(ranks.rank)
    try:
        plan_on_rank(ranks, folder, (*QUICK, f"data.source={source}"))
    except PruneError as error:
        return str(error)
    return ""


def test_ranks_that_see_other_images_are_refused(file, pool, tmp_path):
    source = FILE.replace(
        "self.labels, self.form",
        "self.images[int(__import__('os').environ['OTHER_IMAGES'])] = 0\n        self.labels, self.form",
    )
    (tmp_path / "unlike.py").write_text(source)
    answers = pool.run(2, unlike_on_rank, str(tmp_path / "run"), f"{tmp_path}/unlike.py:Arrays")
    assert all("gives other images, or another order, on some ranks" in answer for answer in answers)


def test_the_report_of_a_run_names_the_source(file, tmp_path):
    """A whole small run in this process, with arguments of the class from the recipe."""
    words = (
        *QUICK, f"data.source={file}:Arrays", "data.kwargs={form: pil}", "finetune.epochs=1", "finetune.batch=60",
        "report.latency_repeats=1", "report.latency_batches=[1]",
    )  # fmt: skip
    recipe = loading.load("quickstart", list(words), methods.options_of)
    assert run(recipe, tmp_path / "run", DistributedEnvironment.single_process()) == ""
    assert report(tmp_path / "run")["recipe"]["data"]["kwargs"] == {"form": "pil"}
