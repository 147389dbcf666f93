"""``data.root`` as a list of shards: which split an entry belongs to, its order, and what is refused."""

from pathlib import Path

import pytest

from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.config.data import shard_splits
from dist_prune.data.datasets import DatasetKeys, open_source
from dist_prune.data.open_split import beton_path
from dist_prune.errors import PruneError
from tests.data.test_tar_shards import cache as cache  # an autouse fixture
from tests.data.test_tar_shards import folders, jpeg, webdataset, write_tar

BOTH = ("train", "val")


@pytest.mark.parametrize(
    ("entry", "splits"),
    [
        ("/a/imagenet-train-0001.tar", ("train",)),
        ("/a/train/0001.tar", ("train",)),
        ("/a/val_set/*.tar", ("val",)),
        ("/a/training/imagenet-val-{0000..0063}.tar", ("val",)),
        ("/a/{split}-*.tar", BOTH),
        ("/a/{train,validation}-*.tar", BOTH),
        ("/disk1/shards", BOTH),
        ("/disk1/train", ("train",)),
    ],
)
def test_the_split_of_an_entry(entry, splits):
    assert shard_splits(entry, BOTH) == splits


def test_a_longer_name_is_not_taken_for_the_shorter_one():
    assert shard_splits("/a/train_held-0.tar", ("train", "train_held")) == ("train_held",)
    assert shard_splits("/a/train-0.tar", ("train", "train_held")) == ("train",)


@pytest.mark.parametrize(("entry", "word"), [("/a/x-0.tar", "neither"), ("/a/train-val.tar", "both")])
def test_an_entry_of_no_split_is_refused(entry, word):
    with pytest.raises(ValueError, match=f"has {word} of the splits' names 'train' and 'val'"):
        shard_splits(entry, BOTH)


def shards(tmp_path: Path) -> list[str]:
    """Three training shards on two disks and one of the evaluation."""
    webdataset(tmp_path / "disk1", "train", shards=2)
    webdataset(tmp_path / "disk2", "train", shards=1, first=40)
    webdataset(tmp_path / "disk2", "val", shards=1, first=80)
    return [
        str(tmp_path / "disk2" / "toy-train-*.tar"),
        str(tmp_path / "disk1"),
        str(tmp_path / "disk2" / "toy-val-0000.tar"),
    ]


def test_a_list_in_its_order(tmp_path):
    root = tuple(shards(tmp_path))
    keys = DatasetKeys(splits=BOTH)
    train = open_source("tar", root, "train", True, dataset=keys)
    assert [Path(name).name for name in train.index.shards] == [  # type: ignore[attr-defined]
        "toy-train-0000.tar", "toy-train-0000.tar", "toy-train-0001.tar",
    ]  # fmt: skip
    assert train.fetch(0) == jpeg(40) and train.fetch(6) == jpeg(0) and len(train.labels) == 18
    val = open_source("tar", root, "val", False, dataset=keys)
    assert len(val.labels) == 6 and val.fetch(0) == jpeg(80)
    assert beton_path("tar", root, "train", True) == tmp_path / "disk2" / "train.beton"


def words(root: str) -> list[str]:
    return ["data.source=tar", f"data.root={root}", "data.image_size=32", "data.mean=", "data.std="]


def test_a_recipe_with_a_list_is_checked_and_its_variables_stay(tmp_path, capsys, monkeypatch):
    first, second, third = shards(tmp_path)
    monkeypatch.setenv("SECOND_DISK", str(tmp_path / "disk2"))
    listed = f"[{first}, {second}, '${{SECOND_DISK}}/toy-val-0000.tar']"
    assert main(["check", "quickstart", *words(listed)]) == 0
    assert "3 classes" in capsys.readouterr().out
    recipe = loading.load("quickstart", words(listed))
    assert recipe.data.root == (first, second, third)
    assert recipe.written()["data"]["root"] == [first, second, "${SECOND_DISK}/toy-val-0000.tar"]


def test_what_is_refused_before_any_file_is_read(tmp_path, capsys):
    first, second, _ = shards(tmp_path)
    for root, said in (
        (f"[{first}]", "no entry of the list is of the split 'val'"),
        ("[]", "no entry of the list is of the split 'train'"),
        (f"[{first}, {tmp_path}/x.tar]", "has neither of the splits' names"),
    ):
        assert main(["check", "quickstart", *words(root)]) == 2
        assert said in capsys.readouterr().err
    assert main(["check", "quickstart", "data.source=imagefolder", f"data.root=[{second}]"]) == 2
    assert "a list is for shards (tar and parquet)" in capsys.readouterr().err


def test_a_missing_shard_of_a_list(tmp_path):
    first, *_ = shards(tmp_path)
    for entry, said in (
        (f"{tmp_path}/disk1/toy-train-0009.tar", "toy-train-0009.tar is missing"),
        (f"{tmp_path}/disk9/toy-train-*.tar", "no file is called"),
    ):
        with pytest.raises(PruneError, match=said):
            open_source("tar", (first, entry), "train", True)
    write_tar(tmp_path / "empty" / "other.tar", {"1.jpg": jpeg(1), "1.cls": b"0"})
    with pytest.raises(PruneError, match=r"none of the 1 entries of the list holds a \*.tar of data.eval_split=val"):
        open_source("tar", (str(tmp_path / "empty"),), "val", False)


def test_a_list_is_scored_as_its_pattern_is(tmp_path):
    """The same images in the same order are the same data set, wherever the shards lie."""
    webdataset(tmp_path / "one", "train", shards=3)
    pattern = open_source("tar", f"{tmp_path}/one/toy-{{split}}-*.tar", "train", True)
    places = []
    for number in range(3):
        place = tmp_path / f"disk{number}" / f"toy-train-{number:04}.tar"
        place.parent.mkdir()
        (tmp_path / "one" / f"toy-train-{number:04}.tar").rename(place)
        places.append(str(place))
    listed = open_source("tar", tuple(places), "train", True)
    assert listed.identity == pattern.identity


def test_a_split_has_no_shards_of_the_other_one(tmp_path):
    """Names that hold both splits' names, or one in the other, never mix training and evaluation images."""
    for name in ("interval-train", "interval-val"):
        write_tar(tmp_path / "both" / f"{name}-0.tar", {"1.jpg": jpeg(1), "1.cls": b"0"})
    keys = DatasetKeys(splits=BOTH)
    for root in (str(tmp_path / "both"), f"{tmp_path}/both/*{{split}}*.tar"):
        with pytest.raises(PruneError, match=r"interval-train-0.tar is of both splits, 'val' and 'train'.* write a"):
            open_source("tar", root, "val", False, dataset=keys)
    assert len(open_source("tar", f"{tmp_path}/both/interval-{{split}}-*.tar", "val", False, dataset=keys).labels) == 1
    splits = ("train", "train_held")
    for name in splits:
        write_tar(tmp_path / "longer" / f"{name}-0.tar", {"1.jpg": jpeg(1), "1.cls": b"0"})
    for root in (str(tmp_path / "longer"), (str(tmp_path / "longer"),)):
        for split in splits:
            source = open_source("tar", root, split, split == "train", dataset=DatasetKeys(splits=splits))
            assert [Path(name).name for name in source.index.shards] == [f"{split}-0.tar"]  # type: ignore[attr-defined]


def test_folders_with_brackets_and_names_in_capitals(tmp_path):
    folder = tmp_path / "set [1]"
    for split in BOTH:
        write_tar(folder / f"x-{split}-0.TAR", {"1.jpg": jpeg(1), "1.cls": b"0"})
    for root in (str(folder), f"{folder}/x-{{train, val}}-*.TAR", (f"{folder}/x-train-0.TAR", f"{folder}/x-val-0.TAR")):
        assert len(open_source("tar", root, "train", True, dataset=DatasetKeys(splits=BOTH)).labels) == 1


def test_a_shard_that_is_named_twice_counts_once(tmp_path):
    first, *_ = shards(tmp_path)
    path = f"{tmp_path}/disk2/toy-train-0000.tar"
    listed = (path, f"{tmp_path}/disk1/../disk2/toy-train-0000.tar", first)
    source = open_source("tar", listed, "train", True)
    assert source.index.shards == (path,)  # type: ignore[attr-defined]
    (tmp_path / "disk2" / "toy-train-0001.tar").symlink_to(path)
    with pytest.raises(PruneError, match=r"toy-train-0000.tar and .*toy-train-0001.tar are one file"):
        open_source("tar", (first,), "train", True)


def test_compressed_shards_in_a_folder_of_a_list(tmp_path):
    (tmp_path / "toy-train-0.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(PruneError, match=r"toy-train-0.tar.gz is compressed.*\(gunzip toy-train-0.tar.gz\)"):
        open_source("tar", (str(tmp_path),), "train", True, dataset=DatasetKeys(splits=BOTH))


@pytest.mark.parametrize("root", ["{split}/*.tar", "{train,val}/x-0.tar", "*/{split}-*.tar", "train/*.tar"])
def test_the_place_of_a_beton_has_no_wildcards(root, tmp_path):
    (tmp_path / "train").mkdir()
    place = tmp_path / "train" if root.startswith("train") else tmp_path
    for value in (f"{tmp_path}/{root}", (f"{tmp_path}/{root}", "/elsewhere/*-val.tar")):
        assert beton_path("tar", value, "train", True) == place / "train.beton"


def test_braces_that_a_shell_replaced_are_explained(tmp_path, capsys):
    webdataset(tmp_path, "train")
    assert main(["check", "quickstart", *words(f"{tmp_path}/toy-train-*.tar")]) == 2
    assert "in quotes on a command line, where a shell would replace braces" in capsys.readouterr().err


def test_shards_where_folders_are_expected_and_compressed_ones(tmp_path, capsys):
    webdataset(tmp_path, "train")
    keys = ["--backbone", "resnet18", "-o", str(tmp_path / "new.yaml")]
    assert main(["pack", "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"It holds 2 tar files: write data.source=tar (pack: --source tar:{tmp_path})" in capsys.readouterr().err
    assert main(["check", "quickstart", "data.source=imagefolder", f"data.root={tmp_path}", *words("")[2:]]) == 2
    assert "It holds 2 tar files: write data.source=tar" in capsys.readouterr().err
    assert main(["new", "--data", f"{tmp_path}/{{split}}-*.tar", *keys]) == 2
    assert "It takes no pattern: name the folder" in capsys.readouterr().err
    (tmp_path / "toy-val-0000.tar.gz").write_bytes(b"\x1f\x8b")
    assert main(["new", "--data", str(tmp_path), *keys]) == 2
    assert "holds compressed shards (toy-val-0000.tar.gz)" in capsys.readouterr().err


def test_numbered_classes_of_which_one_split_lacks_the_last(tmp_path, capsys):
    webdataset(tmp_path, "train")
    write_tar(tmp_path / "toy-val-0000.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"1"})
    assert main(["check", "quickstart", *words(str(tmp_path))]) == 2
    said = capsys.readouterr().err
    assert "(their labels run to 1 and 2)" in said and "data.class_map=FILE" in said
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert main(["check", "quickstart", *words(str(tmp_path)), f"data.class_map={tmp_path}/classes.txt"]) == 0


def test_new_takes_class_folders_rather_than_the_archive_that_they_came_from(tmp_path, capsys):
    for split in BOTH:
        folders(tmp_path, split)
    write_tar(tmp_path / "images_val.tar", {"flat/1.jpg": jpeg(1)})
    recipe = tmp_path / "new.yaml"
    assert main(["new", "--data", str(tmp_path), "--backbone", "resnet18", "-o", str(recipe)]) == 0
    capsys.readouterr()
    assert "12 in train" in recipe.read_text() and "imagefolder" in recipe.read_text()
