"""``dist-prune pack`` and parquet files: the same images under the same ids, resumable, the same bytes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_prune.cli.main import main
from dist_prune.data.datasets import open_source
from dist_prune.data.decoders import read_image
from dist_prune.errors import PruneError
from tests.data.test_tar_shards import folders, jpeg, webdataset

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_parquet(folder: Path, split: str, files: int = 2, each: int = 5, names: bool = True, **columns: list) -> Path:
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    feature = {"_type": "ClassLabel", "names": ["ant", "bee/wasp", "cat"]} if names else {"dtype": "int64"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    for file in range(files):
        ids = range(file * each, (file + 1) * each)
        table = {
            "image": [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in ids],
            "label": [i % 3 for i in ids],
            **{name: values[file * each : (file + 1) * each] for name, values in columns.items()},
        }
        arrow = pyarrow.table(table).replace_schema_metadata(metadata)
        parquet.write_table(arrow, folder / f"{split}-{file:05}-of-{files:05}.parquet", row_group_size=2)
    return folder


def pixels(source, sample: int) -> np.ndarray:
    return np.asarray(read_image(source.fetch(sample)))


def test_parquet_in_the_order_of_files_and_rows(tmp_path):
    source = open_source("parquet", str(write_parquet(tmp_path, "train")), "train", True)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0] and source.classes == ("ant", "bee/wasp", "cat")
    for sample in (9, 0, 4, 5, 3):
        assert source.fetch(sample) == jpeg(sample)
    assert source.location(7).endswith("train-00001-of-00002.parquet: row group 1, row 0")
    bare = open_source("parquet", str(write_parquet(tmp_path / "bare", "train", names=False)), "train", True)
    assert bare.classes == ("0", "1", "2") and bare.identity != source.identity


def test_what_is_refused_about_parquet(tmp_path):
    write_parquet(tmp_path / "a", "train", label=[-1] * 10)
    with pytest.raises(PruneError, match="row 0 of .*00000-of-00002.parquet has the label -1, class numbers start"):
        open_source("parquet", str(tmp_path / "a"), "train", True)
    for name, values, said in (
        ("float", [0.5] * 10, "holds double, neither class numbers nor class names"),
        ("list", [[1]] * 10, "holds list<.*>, neither class numbers"),
        ("null", [0] * 7 + [None] * 3, "row 2 of .*00001-of-00002.parquet has no value in the column 'label'"),
        ("mixed", ["ant"] * 5 + [1] * 5, "some of the 2 files hold class numbers and some class names"),
    ):
        write_parquet(tmp_path / name, "train", label=values)
        with pytest.raises(PruneError, match=said):
            open_source("parquet", str(tmp_path / name), "train", True)
    write_parquet(tmp_path / "far", "train", names=False, label=[0] * 9 + [10**9])
    with pytest.raises(PruneError, match="row 4 of .* has the label 1000000000, far more than the 10 images"):
        open_source("parquet", str(tmp_path / "far"), "train", True)
    write_parquet(tmp_path / "c", "train", image=[{"bytes": None, "path": "x.jpg"}] * 10)
    with pytest.raises(ValueError, match="no bytes of an image, only a path"):
        open_source("parquet", str(tmp_path / "c"), "train", True).fetch(3)
    two = sorted(write_parquet(tmp_path / "order", "train").glob("*.parquet"))
    table = pyarrow.parquet.read_table(two[1])
    other = {"_type": "ClassLabel", "names": ["ant", "cat", "bee/wasp"]}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": other}}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), two[1])
    with pytest.raises(PruneError, match=r"00001-of-00002\.parquet has other class names than .*, from number 1 on"):
        open_source("parquet", str(tmp_path / "order"), "train", True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(PruneError, match="cannot be read as a parquet file"):
        open_source("parquet", str(tmp_path / "d"), "train", True)
    table = pyarrow.table({"picture": [1], "label": [0]})
    (tmp_path / "e").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "e" / "train-0.parquet")
    with pytest.raises(PruneError, match="has the columns picture, label, and none of image"):
        open_source("parquet", str(tmp_path / "e"), "train", True)


def test_class_names_in_the_rows_are_numbered_as_folders_are(tmp_path):
    write_parquet(tmp_path, "train", names=False, label=["wasp", "ant", "bee", "ant", "wasp"] * 2)
    source = open_source("parquet", str(tmp_path), "train", True)
    assert source.classes == ("ant", "bee", "wasp") and source.labels.tolist() == [2, 0, 1, 0, 2] * 2
    assert not source.numbered  # type: ignore[attr-defined]


def pack(*arguments: object) -> int:
    return main(["pack", *map(str, arguments)])


def test_a_folder_packed_into_shards_is_the_same_data_set(tmp_path):
    folders(tmp_path / "folder", "train", each=30)
    assert pack("--source", tmp_path / "folder", "--out", tmp_path / "tar", "--shard-mb", 1, "--name", "toy") == 0
    folder = open_source("imagefolder", str(tmp_path / "folder"), "train", True)
    tar = open_source("tar", str(tmp_path / "tar"), "train", True)
    assert tar.classes == folder.classes and np.array_equal(tar.labels, folder.labels)
    assert all(tar.fetch(i) == folder.fetch(i).read_bytes() for i in range(len(folder.labels)))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["parquet", "tar", "npz"])
def test_other_forms_packed_keep_ids_labels_and_pixels(tmp_path, kind):
    if kind == "parquet":
        source, root = f"parquet:{write_parquet(tmp_path / 'in', 'train')}", str(tmp_path / "in")
    elif kind == "tar":
        source, root = f"tar:{webdataset(tmp_path / 'in', 'train')}", str(tmp_path / "in")
    else:
        root = source = str(tmp_path / "toy.npz")
        images = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
        labels = np.arange(9) % 3
        np.savez(root, x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert pack("--source", source, "--out", tmp_path / "tar") == 0
    before, after = open_source(kind, root, "train", True), open_source("tar", str(tmp_path / "tar"), "train", True)
    assert np.array_equal(before.labels, after.labels)
    for sample in range(len(before.labels)):
        assert np.array_equal(pixels(before, sample), pixels(after, sample))


def test_packing_resumes_after_a_kill_with_the_same_bytes(tmp_path, capsys):
    folders(tmp_path / "folder", "train", each=900)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        assert pack("--source", tmp_path / "folder", "--out", out, "--shard-mb", 1, "--name", "toy") == 0
    shards = sorted(path.name for path in whole.glob("*.tar"))
    assert len(shards) > 2
    first = (broken / shards[0]).stat().st_mtime_ns
    manifest = json.loads((broken / "toy-train.json").read_text())
    manifest["shards"] = manifest["shards"][:2]  # killed within the third shard
    (broken / "toy-train.json").write_text(json.dumps(manifest))
    (broken / shards[1]).write_bytes(b"damaged since")
    (broken / shards[2]).rename(broken / "toy-train-000002.part")
    for name in shards[3:]:
        (broken / name).unlink()
    assert pack("--source", tmp_path / "folder", "--out", broken, "--shard-mb", 1, "--name", "toy") == 0
    assert "1 finished shards are kept" in capsys.readouterr().err
    assert (broken / shards[0]).stat().st_mtime_ns == first, "finished shards are not written again"
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in shards)


def test_packing_looks_at_its_output_and_its_source_first(tmp_path, capsys):
    folders(tmp_path / "folder", "train")
    (tmp_path / "file").write_text("")
    assert pack("--source", tmp_path / "folder", "--out", tmp_path / "file" / "tar") == 2
    assert (
        f"--out: {tmp_path / 'file' / 'tar'} cannot be made: {tmp_path / 'file'} is no folder"
        in capsys.readouterr().err
    )
    assert pack("--source", tmp_path / "nowhere", "--out", tmp_path / "tar") == 2
    assert f"--source: there is no {tmp_path / 'nowhere'}; name an image folder" in capsys.readouterr().err


def test_what_packing_refuses(tmp_path, capsys):
    members = folders(tmp_path / "folder", "train")
    bad = tmp_path / "folder" / "train" / next(iter(members))
    bad.write_bytes(b"no image")
    assert pack("--source", tmp_path / "folder", "--out", tmp_path / "tar") == 2
    assert f"{bad} cannot be read" in capsys.readouterr().err
    assert pack("--source", tmp_path / "folder", "--out", tmp_path / "tar", "--on-error", "skip") == 0
    assert f"left out: {bad}" in capsys.readouterr().out
    assert len(open_source("tar", str(tmp_path / "tar"), "train", True).labels) == 11
    folders(tmp_path / "other", "train", each=3)
    assert pack("--source", tmp_path / "other", "--out", tmp_path / "tar") == 2
    assert "shards of other images" in capsys.readouterr().err
    (tmp_path / "tar" / "tar-train.json").unlink()
    assert pack("--source", tmp_path / "other", "--out", tmp_path / "tar") == 2
    assert "is there already" in capsys.readouterr().err


def test_a_png_of_one_channel_is_kept(tmp_path):
    from dist_prune.data.tar_writer import image_bytes

    gray = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    with Image.open(io.BytesIO(image_bytes(gray))) as image:
        assert image.mode == "L" and np.array_equal(np.asarray(image), gray[..., 0])
