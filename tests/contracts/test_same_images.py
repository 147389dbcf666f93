"""The same images as folder, tar shards, parquet files, raw .beton and arrays: one plan, on any number of ranks."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_prune import methods
from dist_prune.cli.main import main
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.ffcv.backend import open_beton
from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.support import tiny

FORMS = ("imagefolder", "tar", "packed", "parquet", "beton", "npz")


@pytest.fixture(scope="module")
def root(tmp_path_factory, ffcv) -> Path:
    """``tiny.IMAGES`` digits in RGB, in the order of a folder, in each of the forms."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    place = tmp_path_factory.mktemp("forms")
    digits = open_source("digits", None, "", True)
    assert isinstance(digits, ArraySource)
    order = sorted(range(tiny.IMAGES), key=lambda sample: (digits.labels[sample], sample))
    images, labels = digits.images[order].repeat(3, axis=3), digits.labels[order]
    np.savez(place / "arrays.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    stored = []
    with tarfile.open(place / "digits-train-0.tar", "w") as archive:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            out = io.BytesIO()
            Image.fromarray(image).save(out, "PNG")
            stored.append({"bytes": out.getvalue(), "path": None})
            for name, content in ((f"{number:04}.png", out.getvalue()), (f"{number:04}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            file = place / "train" / str(label) / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(out.getvalue())
    table = pyarrow.table({"image": stored, "label": labels.tolist()})
    parquet.write_table(table, place / "train-0.parquet", row_group_size=7)
    assert main(["pack", "--source", str(place), "--out", str(place / "packed"), "--name", "digits"]) == 0
    assert (
        main(["pack", "--source", str(place), "--to", "ffcv", "--write-mode", "raw", "--out", f"{place}/raw.beton"])
        == 0
    )
    return place


def source_of(form: str, root: Path):
    if form == "beton":
        return open_beton(root / "raw.beton")
    if form == "packed":
        return open_source("tar", str(root / "packed"), "train", True)
    return open_source(form, str(root / "arrays.npz" if form == "npz" else root), "train", True)


def plans(ranks: Communicator, name: str, root: Path) -> dict[str, str]:
    """Form -> fingerprint of the plan scored from it."""
    kind, out = methods.find(name), {}
    for form in FORMS:
        method = kind(kind.Options())
        context = tiny.bench(tiny.network(in_chans=3), ranks, tiny.feed_of(source_of(form, root)))
        scores = method.score(context)
        out[form] = method.select(scores, context.graph, SelectionRequest(target=("macs", 0.5))).fingerprint
    return out


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", [pytest.param("entropy", marks=pytest.mark.slow), "taylor"])
def test_one_plan_from_every_form(name, world, root, pool):
    alone = plans(Communicator(), name, root)["npz"]
    for found in pool.run(world, plans, name, root):
        assert found == dict.fromkeys(FORMS, alone)


def test_the_forms_have_the_same_labels(root):
    wanted = source_of("npz", root).labels
    for form in FORMS:
        assert np.array_equal(source_of(form, root).labels, wanted), form
