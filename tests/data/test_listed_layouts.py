"""Data sets whose classes are listed in a file: tiny-ImageNet, ImageNet's flat val, CUB-200, CSV splits, SVHN."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from dist_prune.data.datasets import class_folders, open_source
from dist_prune.errors import PruneError
from tests.data.test_tar_shards import folders, jpeg


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def found(root: Path, split: str, train: bool = False) -> dict[str, str]:
    """File name -> class name, as it is opened."""
    source = open_source("imagefolder", str(root), split, train)
    return {Path(source.location(i)).name: source.classes[label] for i, label in enumerate(source.labels)}


def flat_val(root: Path, count: int = 4) -> None:
    for i in range(count):
        put(root / "val" / f"ILSVRC2012_val_{i + 1:08}.JPEG", jpeg(i))


def test_tiny_imagenet(tmp_path):
    for synset in ("n02", "n01", "n03"):
        put(tmp_path / "train" / synset / "images" / f"{synset}_0.JPEG", jpeg(1))
    for i in range(3):
        put(tmp_path / "val" / "images" / f"val_{i}.JPEG", jpeg(i))
    put(
        tmp_path / "val" / "val_annotations.txt",
        "val_0.JPEG\tn03\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\nval_2.JPEG\tn03\t1\t1\t2\t2\n",
    )
    put(tmp_path / "wnids.txt", "n02\nn01\nn03\n")
    assert found(tmp_path, "val") == {"val_0.JPEG": "n03", "val_1.JPEG": "n01", "val_2.JPEG": "n03"}
    assert class_folders(str(tmp_path), "train", "val")[0] == ("n01", "n02", "n03")
    train = open_source("imagefolder", str(tmp_path), "train", True)
    assert train.classes == open_source("imagefolder", str(tmp_path), "val", False).classes
    notes = tmp_path / "val" / "val_annotations.txt"
    text = notes.read_text()
    notes.write_text(text + "val_2.JPEG\tn01\t1\t1\t2\t2\n")
    with pytest.raises(PruneError, match="lists images/val_2.JPEG twice, as 'n03' and as 'n01'"):
        found(tmp_path, "val")
    notes.write_text(text)
    (tmp_path / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(PruneError, match="val_1.JPEG is listed by .*tiny-ImageNet.* and is not there"):
        found(tmp_path, "val")


def test_imagenet_s_flat_val_by_a_list_of_synsets(tmp_path):
    flat_val(tmp_path)
    put(tmp_path / "imagenet_2012_validation_synset_labels.txt", "n2\nn1\nn2\nn9\n")
    assert list(found(tmp_path, "val").values()) == ["n1", "n2", "n2", "n9"]
    assert found(tmp_path, "val")["ILSVRC2012_val_00000004.JPEG"] == "n9"
    flat_val(tmp_path, 5)
    with pytest.raises(PruneError, match="lists 4 images, and .* holds 5"):
        found(tmp_path, "val")


def test_imagenet_s_flat_val_by_kaggle_s_list(tmp_path):
    inner = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    flat_val(inner, 2)
    rows = (
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n1 1 2 3 4 n1 5 6 7 8\nILSVRC2012_val_00000001,n7 1 2 3 4\n"
    )
    put(tmp_path / "LOC_val_solution.csv", rows)
    assert found(inner, "val") == {"ILSVRC2012_val_00000001.JPEG": "n7", "ILSVRC2012_val_00000002.JPEG": "n1"}
    for more, said in (
        ("ILSVRC2012_val_00000001,n8 1 2 3 4\n", "lists ILSVRC2012_val_00000001 twice, as 'n7' and as 'n8'"),
        ("ILSVRC2012_val_00000003,\n", "row 4 of .*LOC_val_solution.csv has no ImageId or no PredictionString"),
    ):
        put(tmp_path / "LOC_val_solution.csv", rows + more)
        with pytest.raises(PruneError, match=said):
            found(inner, "val")
    put(tmp_path / "LOC_val_solution.csv", rows)
    flat_val(inner, 3)
    with pytest.raises(PruneError, match="00000003.JPEG is not listed"):
        found(inner, "val")


def test_imagenet_s_flat_val_by_the_devkit(tmp_path):
    flat_val(tmp_path, 3)
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    put(kit / "ILSVRC2012_validation_ground_truth.txt", "2\n1\n2\n")
    with pytest.raises(PruneError, match="its meta.mat must lie beside it"):
        found(tmp_path, "val")
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    table = np.array([(1, "n5", 0), (2, "n4", 0), (3, "n_animal", 2)], dtype=fields)
    savemat(kit / "meta.mat", {"synsets": table})
    assert list(found(tmp_path, "val").values()) == ["n4", "n4", "n5"]


def test_cub_200(tmp_path):
    for i, name in enumerate(("001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg"), 1):
        put(tmp_path / "images" / name, jpeg(i))
    put(
        tmp_path / "images.txt",
        "1 001.Albatross/a.jpg\n2 001.Albatross/b.jpg\n3 002.Auklet/c.jpg\n4 002.Auklet/d.jpg\n",
    )
    put(tmp_path / "image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n")
    put(tmp_path / "classes.txt", "1 001.Albatross\n2 002.Auklet\n")
    put(tmp_path / "train_test_split.txt", "1 1\n2 0\n3 0\n4 1\n")
    assert found(tmp_path, "train", True) == {"a.jpg": "001.Albatross", "d.jpg": "002.Auklet"}
    assert found(tmp_path, "val") == {"b.jpg": "001.Albatross", "c.jpg": "002.Auklet"}
    put(tmp_path / "image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n4 1\n")
    with pytest.raises(PruneError, match="image_class_labels.txt lists 4 twice, as '2' and as '1'"):
        found(tmp_path, "train", True)
    put(tmp_path / "image_class_labels.txt", "1 1\n2 1\n3 2\n4 7\n")
    with pytest.raises(PruneError, match="number '7' is in one of the lists and not in another"):
        found(tmp_path, "train", True)


def test_a_csv_split(tmp_path):
    for i in range(4):
        put(tmp_path / "images" / f"n{i}.jpg", jpeg(i))
    put(tmp_path / "train.csv", "filename,label\nn3.jpg,cat\nn0.jpg,ant\n")
    put(tmp_path / "val.csv", "file;class\nn1.jpg;cat\n")
    assert found(tmp_path, "train", True) == {"n0.jpg": "ant", "n3.jpg": "cat"}
    with pytest.raises(PruneError, match="has the columns file;class; it needs filename,label"):
        found(tmp_path, "val")


@pytest.mark.parametrize(("rows", "said"), [
    ("a.jpg,cat\na.jpg,ant\n", r"lists a\.jpg twice, as 'cat' and, in row 3, as 'ant'"),
    ("a.jpg,cat\nb.jpg\n", r"row 3 of .*train\.csv has no label"),
    ("a.jpg,cat\n,ant\n", r"row 3 of .*train\.csv has no filename"),
])  # fmt: skip
def test_rows_of_a_csv_split_that_would_be_guessed_are_refused(tmp_path, rows, said):
    for name in "ab":
        put(tmp_path / "images" / f"{name}.jpg", jpeg(1))
    put(tmp_path / "train.csv", "filename,label\n" + rows)
    with pytest.raises(PruneError, match=said):
        found(tmp_path, "train", True)


def test_a_csv_split_of_a_spreadsheet_begins_with_a_mark(tmp_path):
    put(tmp_path / "images" / "a.jpg", jpeg(1))
    put(tmp_path / "train.csv", "\ufefffilename,label\na.jpg,cat\na.jpg,cat\n")
    assert found(tmp_path, "train", True) == {"a.jpg": "cat"}


def test_class_folders_come_before_a_list(tmp_path):
    folders(tmp_path, "val", classes=2, each=1)
    put(tmp_path / "val.csv", "filename,label\nmissing.jpg,cat\n")
    assert open_source("imagefolder", str(tmp_path), "val", False).classes == ("class 0", "class 1")


def test_svhn(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (32, 32, 3, 5), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [1], [2], [9], [10]])})
    with pytest.raises(PruneError, match="no svhn in"):  # torchvision checks the published digest
        open_source("svhn", str(tmp_path), "", True)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5: True)
    source = open_source("svhn", str(tmp_path), "", False)
    assert source.labels.tolist() == [0, 1, 2, 9, 0]
    assert np.array_equal(source.fetch(3), images[..., 3])


def test_pickled_caches_are_never_read_and_the_remedy_is_said(tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    cache = tmp_path / "mini-imagenet-cache-train.pkl"
    cache.write_bytes(pickle.dumps({"image_data": Harm(), "class_dict": {}}))
    for source, root in (("npz", cache), ("imagefolder", cache), ("imagefolder", tmp_path)):
        with pytest.raises(PruneError, match="is a pickle, .* never read here. Convert it .*#pickled-caches"):
            open_source(source, str(root), "train", True)
    assert not (tmp_path / "harm").exists()


def test_the_documented_conversion_of_a_pickled_cache(tmp_path, monkeypatch):
    """The lines of docs/data.md, run on a cache of the usual form."""
    import pickle
    import textwrap

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (36, 84, 84, 3), np.uint8)
    members = {name: list(range(start, 36, 3)) for start, name in enumerate(("n03", "n01", "n02"))}
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(
        pickle.dumps({"image_data": images, "class_dict": members})
    )
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = text[text.index("    import pickle") : text.index("Then `data.source=npz data.root=mini.npz`")]
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(lines), {})
    train, test = (open_source("npz", str(tmp_path / "mini.npz"), "", one) for one in (True, False))
    assert (len(train.labels), len(test.labels)) == (30, 6)
    assert train.classes == ("0", "1", "2") and test.labels.tolist() == [2, 2, 2, 2, 2, 2]
    assert np.array_equal(train.images[0], images[1]) and train.labels[0] == 0  # n01
