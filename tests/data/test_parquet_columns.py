"""What the columns of parquet files may hold, and files that change."""

import os
from pathlib import Path

import pytest

from dist_prune.data.datasets import open_source
from dist_prune.errors import PruneError
from tests.data.test_tar_shards import cache as cache  # an autouse fixture
from tests.data.test_tar_shards import jpeg

pyarrow = pytest.importorskip("pyarrow")
IMAGES = [jpeg(i) for i in range(12)]
LABELS = [11, *range(11)]


def write(path: Path, columns: dict, rows: int = 100) -> Path:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def opened(folder: Path):
    return open_source("parquet", str(folder), "train", True)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "more fields"])
def test_forms_of_an_image(kind, tmp_path):
    column = [{"meta": {"a": [1, 2]}, "bytes": image} for image in IMAGES]
    if kind != "more fields":
        column = pyarrow.array(IMAGES, type=getattr(pyarrow, kind)())
    write(tmp_path / "train-0.parquet", {"image": column, "label": LABELS}, rows=5)
    source = opened(tmp_path)
    assert [source.fetch(i) for i in (0, 11, 6)] == [IMAGES[i] for i in (0, 11, 6)]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (["a.jpg"] * 12, "holds string"),
        ([[{"bytes": image}] for image in IMAGES], "holds list<"),
        ([{"path": "a.jpg"}] * 12, "holds struct<path: string>"),
    ],
)
def test_a_column_that_holds_no_image_files_is_refused_at_once(column, said, tmp_path):
    write(tmp_path / "train-0.parquet", {"image": column, "label": LABELS})
    with pytest.raises(PruneError, match=f"the column 'image' of .*train-0.parquet {said}.*write it as binary"):
        opened(tmp_path)


def test_a_missing_column_is_named_with_the_remedy(tmp_path):
    write(tmp_path / "train-0.parquet", {"image": IMAGES, "y": LABELS})
    with pytest.raises(PruneError, match="has the columns image, y, and none of label, .* of labels may have: rename"):
        opened(tmp_path)


def test_files_may_name_their_columns_differently(tmp_path):
    write(tmp_path / "train-0.parquet", {"image": IMAGES, "label": LABELS})
    write(tmp_path / "train-1.parquet", {"label": LABELS, "img": IMAGES[::-1]})
    source = opened(tmp_path)
    assert source.fetch(1) == IMAGES[1] and source.fetch(13) == IMAGES[-2]


def test_a_file_without_rows_does_not_make_numbers_names(tmp_path):
    write(tmp_path / "train-0.parquet", {"image": IMAGES, "label": LABELS})
    write(tmp_path / "train-1.parquet", {"image": [], "label": []})
    source = opened(tmp_path)
    assert source.labels.tolist() == LABELS and source.classes == tuple(map(str, range(12)))
    assert source.numbered  # type: ignore[attr-defined]


def test_a_damaged_column_of_labels_is_named(tmp_path):
    path = write(tmp_path / "train-0.parquet", {"image": IMAGES, "label": LABELS})
    from pyarrow import parquet

    own = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    place = own.dictionary_page_offset or own.data_page_offset
    content[place : place + 12] = b"\xff" * 12
    path.write_bytes(content)
    with pytest.raises(PruneError, match=r"the column 'label' of .*train-0.parquet cannot be read.*copy it again$"):
        opened(tmp_path)


def test_a_file_that_is_replaced(tmp_path):
    """Opened again, its new images are read; with other rows than it had, an image is an unreadable one."""
    path = write(tmp_path / "train-0.parquet", {"image": IMAGES, "label": LABELS})
    first = opened(tmp_path)
    assert first.fetch(1) == IMAGES[1]
    write(path, {"image": IMAGES[::-1], "label": LABELS})
    os.utime(path, ns=(1, 1))
    assert opened(tmp_path).fetch(1) == IMAGES[-2]
    for i in range(3):  # not of those that are kept in memory
        write(tmp_path / "b" / "train-0.parquet", {"image": IMAGES, "label": LABELS})
        os.utime(tmp_path / "b" / "train-0.parquet", ns=(i, i))
        opened(tmp_path / "b").fetch(0)
    write(path, {"image": IMAGES[:1], "label": [0]})
    with pytest.raises(ValueError, match="has other rows than when it was opened: it was replaced"):
        first.fetch(4)


def test_one_file_by_two_names_does_not_count_twice(tmp_path):
    path = write(tmp_path / "train-0.parquet", {"image": IMAGES, "label": LABELS})
    spelled = (str(path), f"{tmp_path}/./x/../train-0.parquet")
    (tmp_path / "x").mkdir()
    assert len(open_source("parquet", spelled, "train", True).labels) == 12
    (tmp_path / "train-1.parquet").symlink_to(path)
    with pytest.raises(PruneError, match=r"train-0.parquet and .*train-1.parquet are one file, .*: name one of them"):
        opened(tmp_path)
