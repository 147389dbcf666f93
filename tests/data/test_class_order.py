"""Class folders: who has which number, folders that are not where they should be, files that are no images."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from dist_prune import methods
from dist_prune.cli.check import as_text, preview
from dist_prune.config import loading
from dist_prune.data import class_order, folder_index, folder_scan
from dist_prune.data.datasets import FolderSource, open_source
from dist_prune.data.decoders import read_image
from dist_prune.data.ffcv.backend import FfcvSource
from dist_prune.data.open_split import open_split
from dist_prune.data.split_checks import check_same_classes
from dist_prune.errors import PruneError

RNG = np.random.default_rng(0)
TWELVE = [str(n) for n in range(12)]


def image(path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)).save(path, **options)


def made(root: Path, names: list[str], splits: tuple[str, ...] = ("train", "val")) -> Path:
    for split in splits:
        for name in names:
            image(root / split / name / "x.png")
    return root


def opened(root: Path, split: str = "train") -> FolderSource:
    found = open_source("imagefolder", str(root), split, split.startswith("train"))
    assert isinstance(found, FolderSource)
    return found


NAMES = [TWELVE, ["class_2", "Class_10", "class_1", "b", "A"], ["n01440764", "n01443537"], ["a1b20", "a1b3", "a2b1"]]


@pytest.mark.parametrize("names", NAMES)
def test_natural_order_is_timms(tmp_path, names):
    made(tmp_path, names)
    found = class_order.renumber(opened(tmp_path), "natural", None)
    theirs = ReaderImageFolder(str(tmp_path / "train"))
    assert {name: number for number, name in enumerate(found.classes)} == theirs.class_to_idx
    mine = {str(found.paths[n]): label for n, label in enumerate(found.labels.tolist())}
    assert mine == dict(theirs.samples)
    assert all(class_order.natural_key(name) == natural_key(name) for name in names)


@pytest.mark.parametrize("names", [["a1", "a01"], ["Cat", "cat", "dog"]])
def test_names_that_timm_orders_by_chance_are_refused(names):
    with pytest.raises(PruneError, match=r"are alike in natural order .*data\.class_map"):
        class_order.sort_classes(names, "natural")
    assert class_order.sort_classes(names, None) == sorted(names)


def test_text_order_is_torchvisions_and_nothing_moves_without_the_key(tmp_path):
    from torchvision.datasets import ImageFolder

    plain = opened(made(tmp_path, TWELVE))
    assert list(plain.classes) == ImageFolder(str(tmp_path / "train")).classes == sorted(TWELVE)
    for order in (None, "text"):
        assert class_order.renumber(plain, order, None) is plain
    other = class_order.renumber(plain, "natural", None)
    assert other.identity != plain.identity, "a run directory of one order refuses the other"
    assert class_order.renumber(opened(tmp_path), "natural", None).identity == other.identity
    same = opened(made(tmp_path / "same", ["a", "b"]))
    assert class_order.renumber(same, "natural", None).identity == same.identity


def test_a_beton_follows_the_order_too(ffcv, tmp_path):
    """Written in text order, whatever the recipe says; with the folder beside it or alone it is the same data set."""
    from dist_prune.data.ffcv.encoder import Settings
    from dist_prune.data.ffcv.writer import write_beton

    class Silent:
        update = close = staticmethod(lambda *_: None)

    plain = opened(made(tmp_path, TWELVE))
    write_beton(plain, {}, tmp_path / "train.beton", Settings(64, 90, "raw"), 1, lambda text: None, lambda *_: Silent())
    wanted = class_order.renumber(plain, "natural", None)
    for alone in (False, True):
        if alone:
            shutil.rmtree(tmp_path / "train")
        stored = open_split("ffcv", "imagefolder", str(tmp_path), "train", True).source
        assert isinstance(stored, FfcvSource)
        assert stored.classes == plain.classes
        found = class_order.renumber(stored, "natural", None)
        assert (found.classes, found.identity) == (wanted.classes, wanted.identity)
        assert found.labels.tolist() == wanted.labels.tolist() != plain.labels.tolist()


@pytest.mark.parametrize("form", ["txt", "list.json", "numbers.json"])
def test_a_class_map_file(tmp_path, form):
    names = ["dog", "cat", "zebra", "ant"]
    plain = opened(made(tmp_path, ["ant", "cat", "dog"]))
    file = tmp_path / f"map.{form}"
    body = names if form.startswith("list") else {name: number for number, name in enumerate(names)}
    file.write_text("\n".join(names) + "\n" if form == "txt" else json.dumps(body))
    found = class_order.renumber(plain, None, str(file))
    assert found.classes == tuple(names)
    assert [found.classes[label] for label in found.labels] == ["ant", "cat", "dog"]
    assert found.identity != plain.identity
    said = class_order.describe_order(found.classes, 1, 3, None, str(file))
    assert said == f"4 classes, numbered by {file}, 1 of which have no image here: dog, cat, zebra, ant"


def test_class_maps_that_are_none(tmp_path):
    plain, file = opened(made(tmp_path, ["ant", "cat"])), tmp_path / "map.txt"
    for text, said in (
        ("ant\ncatt\n", r"does not list the class folder 'cat'\. Did you mean 'catt'\?"),
        ("ant\ncat\nant\n", "lists 'ant' twice"),
        ("", "lists no class"),
    ):
        file.write_text(text)
        with pytest.raises(PruneError, match=rf"data\.class_map: .*{said}"):
            class_order.renumber(plain, None, str(file))
    for body, said in (({"ant": 0, "cat": 2}, "not 0 to 1"), ([1, 2], "neither a list of class names nor")):
        file = tmp_path / "map.json"
        file.write_text(json.dumps(body))
        with pytest.raises(PruneError, match=said):
            class_order.renumber(plain, None, str(file))
    with pytest.raises(PruneError, match="cannot be read"):
        class_order.renumber(plain, None, str(tmp_path / "none.txt"))


@pytest.mark.parametrize("words", [["data.class_order=natural"], ["data.class_map=x.txt"]])
def test_arrays_have_numbers_already(words):
    with pytest.raises(PruneError, match=r"is for folders of images: labels of arrays are numbers already"):
        loading.load("quickstart", words, methods.options_of)


def test_a_warning_only_where_orders_differ_and_nobody_chose():
    said = class_order.class_order_warning(TWELVE, None, None, "w.pth")
    assert said.startswith("WARNING: class folders are numbered as text here (number 2 is '10')")
    assert "(number 2 is '2'). If timm trained the weights (w.pth), the classes are mixed up" in said
    for names, order, file in ((TWELVE, "text", None), (TWELVE, None, "x.txt"), (["a", "b"], None, None)):
        assert class_order.class_order_warning(names, order, file, "w.pth") == ""


def checked(root: Path, *words: str):
    text = ["data.source=imagefolder", f"data.root={root}", "backbone.name=resnet8p_cifar", "data.image_size=8"]
    spec = loading.load("quickstart", [*text, "data.mean=", "data.std=", *words], methods.options_of)
    kind = methods.find(spec.method["name"])
    return preview(spec, kind(kind.Options()))


def test_check_says_the_order_and_warns(tmp_path):
    made(tmp_path, TWELVE)
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (file := tmp_path / "w.pth").touch()
    body = checked(tmp_path, "train.epochs=0", f"backbone.checkpoint={file}")
    assert body["classes"] == 12
    order = "12 classes, numbered in text order: 0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9; left out: 1 hidden"
    assert order in body["notes"]
    assert f"weights: {file}; the dense network has them" in as_text(body)
    assert "WARNING: class folders are numbered as text here" in as_text(body)
    body = checked(tmp_path, "train.epochs=3", f"backbone.checkpoint={file}", "data.class_order=natural")
    assert (
        "12 classes, numbered in natural order: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11; left out: 1 hidden"
        in body["notes"]
    )
    assert "trained from them for 3 epochs, a head of other classes made anew" in as_text(body)
    assert "WARNING" not in as_text(body)
    timms = ("backbone.name=test_resnet", "backbone.kwargs={}", "backbone.pretrained=true", "target.macs=0.8")
    fetched = checked(tmp_path, *timms)
    for body in (checked(tmp_path), fetched):  # no weights from elsewhere; timm's, whose head of 1,000 does not stay
        assert not [line for line in body["notes"] if "WARNING" in line]


def both(root: Path, said: str) -> None:
    """A run and ``check`` refuse alike."""
    for refuse in (lambda: opened(root), lambda: checked(root)):
        with pytest.raises(PruneError, match=said):
            refuse()


def test_images_one_level_too_deep(tmp_path):
    made(tmp_path / "data", ["images/cat", "images/dog", "images/emu"])
    both(
        tmp_path / "data", r"single class folder, 'images', .*one level deeper, in 3 folders .*train_split=train/images"
    )
    found = opened(tmp_path / "data", "train/images")
    assert found.classes == ("cat", "dog", "emu")
    with pytest.raises(PruneError, match=r"data\.eval_split=val/images"):
        opened(tmp_path / "data", "val")
    check_same_classes(found, opened(tmp_path / "data", "val/images"))


def test_a_link_to_itself_is_no_class(tmp_path):
    """Among the folders that a message names, and among the files of one."""
    root = made(tmp_path, ["cat", "dog"])
    (root / "circle").symlink_to("circle")
    (root / "train/cat/circle.png").symlink_to("circle.png")
    with pytest.raises(PruneError, match=r"there is no folder .*elsewhere.* has train, val"):
        opened(root, "elsewhere")
    with pytest.raises(PruneError, match=r"holds class folders itself \(cat, dog\)"):
        open_source("imagefolder", str(root / "train"), "train", True)


def test_a_single_class(tmp_path):
    both(made(tmp_path, ["cat"]), r"single class folder, 'cat': with one class there is nothing to learn")


def test_images_without_classes(tmp_path):
    for split in ("train", "val"):
        image(tmp_path / split / "x.png")
    both(tmp_path, r"has no class folders.*Its 1 images lie in it directly")


def test_a_root_that_is_not_the_root(tmp_path):
    made(tmp_path / "sets/birds", ["cat", "dog"], ("train", "test"))
    with pytest.raises(PruneError, match=rf"write data\.root={tmp_path}/sets/birds"):
        opened(tmp_path / "sets")
    with pytest.raises(PruneError, match=rf"write data\.root={tmp_path}/sets/birds data\.train_split=train"):
        opened(tmp_path / "sets/birds/train")
    with pytest.raises(PruneError, match=r"has test, train: data\.eval_split= names another"):
        opened(tmp_path / "sets/birds", "val")


LOSSLESS = (".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pnm", ".tga", ".pcx", ".sgi", ".qoi", ".ras")


@pytest.mark.parametrize("suffix", folder_scan.IMAGE_FILES)
def test_every_kind_of_image_file_is_found_and_read(tmp_path, suffix):
    """Written by Pillow where it can, in capitals too; a Sun raster by hand."""
    pixels = np.kron(RNG.integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    picture = Image.fromarray(pixels)
    for name in (f"a{suffix}", f"B{suffix.upper()}"):
        path = tmp_path / "train" / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".ras":
            words = [0x59A66A95, 32, 32, 24, 32 * 32 * 3, 1, 0, 0]
            path.write_bytes(np.array(words, ">u4").tobytes() + pixels[..., ::-1].tobytes())
            continue
        options = {"sizes": [(32, 32)]} if suffix == ".ico" else {}
        kind = Image.registered_extensions()[suffix]
        shown = picture.convert("L") if suffix == ".pgm" else picture.convert("1") if suffix == ".pbm" else picture
        shown.save(path, format=kind, **options)
    image(tmp_path / "train/dog/x.png")
    found = opened(tmp_path)
    assert np.bincount(found.labels).tolist() == [2, 1]
    assert found.note.endswith("train.index.npz")
    for number in range(2):
        read = np.asarray(read_image(found.paths[number])).astype(int)
        assert read.shape == (32, 32, 3)
        if suffix in LOSSLESS:
            assert np.array_equal(read, pixels)


def test_what_is_left_out_is_counted_and_said(tmp_path):
    made(tmp_path, ["cat", "dog"])
    for name in (
        "cat/notes.txt",
        "cat/b.TXT",
        "dog/scan.heic",
        "dog/.DS_Store",
        "cat/README",
        "labels.csv",
        "loose.png",
    ):
        (tmp_path / "train" / name).write_bytes(b"x")
    image(tmp_path / "train/cat/.ipynb_checkpoints/x-checkpoint.png")
    image(tmp_path / "train/.ipynb_checkpoints/x-checkpoint.png")
    for place in (tmp_path / "train", tmp_path / "train/cat", tmp_path / "train/dog"):
        os.utime(place, (1e9, 1e9))
    for how in ("scanned", "by"):  # from a scan, and from the index that it kept
        found = opened(tmp_path)
        assert how in found.note
        for said in ("2 .txt", "1 .heic", "3 hidden", "1 without a suffix", "1 .csv beside", "1 .png beside"):
            assert said in found.note
    assert len(found.labels) == 2
    assert checked(tmp_path)["classes"] == 2
    paths, left = folder_scan.find_images(tmp_path / "train")
    assert [path.name for path in paths] == ["loose.png", "x.png", "x.png"]
    assert left["hidden"] == 3


def test_check_refuses_what_a_run_refuses(tmp_path):
    made(tmp_path, ["cat", "dog", "emu"])
    image(tmp_path / "train/emu/deep/er.png")
    (tmp_path / "train/emu/x.png").unlink()
    (tmp_path / "train/.DS_Store").touch()
    assert checked(tmp_path)["notes"][0].endswith(
        "text order: cat, dog, emu; natural order is the same; left out: 1 hidden"
    )
    (tmp_path / "train/emu/deep/er.png").unlink()
    both(tmp_path, r"class folder .*emu holds no image")
    shutil.rmtree(tmp_path / "train/emu")
    with pytest.raises(
        PruneError, match=r"evaluation images have 3 classes, the training images 2; .*only there: \['emu'\]"
    ):
        checked(tmp_path)


def test_an_index_of_before_is_made_again(tmp_path):
    made(tmp_path, ["cat", "dog"])
    opened(tmp_path)
    place = tmp_path / "train.index.npz"
    arrays = dict(np.load(place))
    np.savez(place, **{key: value for key, value in arrays.items() if key != "text"} | {"format": 2})
    assert folder_index.load(place) is None
    assert "scanned" in opened(tmp_path).note
