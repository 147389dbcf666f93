"""A new data form is one class: gradients drawn by their sample id, known to this file alone, through all of the data
package, against the shipped forms of the same pixels.
"""

import ast
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.config.data import SOURCES
from dist_prune.data import datasets
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.ffcv.backend import open_beton, read_sidecar
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.open_split import open_split
from dist_prune.data.random_access import RandomAccessSource, SplitSpec, StoredImage
from dist_prune.errors import PruneError
from dist_prune.pipeline.images import RunImages
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.training.tracking import Tracker
from tests.support import tiny

CPU, COUNT = torch.device("cpu"), 60
LABELS = np.arange(COUNT) * 2 // COUNT
ROOT = Path(__file__).resolve().parents[2]
LISTS = [np.array([5, 5, 59]), np.arange(33)[::-1], np.array([17])]
LOOKS = (
    (TransformConfig(16, (0.5,) * 3, (0.5,) * 3, crop=0.9), None),
    (TransformConfig(16, (0.5,) * 3, (0.5,) * 3, augment="crop_flip", erasing=0.5), (3, 1)),
    (TransformConfig(16, (0.5,) * 3, (0.5,) * 3, augment="resized_crop_flip", auto_augment="rand-m9-mstd0.5"), (3, 1)),
)


def gradient(sample: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: a slope whose direction and colours come from the sample id."""
    down, right = np.mgrid[:height, :width]
    channels = [down * (3 + sample % 5) + right * (2 + sample % 7), right * (1 + sample % 11), down * 9 + sample]
    return (np.stack(channels, 2) % 256).astype(np.uint8)


@dataclass(frozen=True)
class GradientSource:
    """Gradients made when they are fetched.

    Attributes:
        fixed_size: of every image; None: sizes of their own.
        encoded: hand out the bytes of PNG files, as a tar shard would; else pixels, as a torch ``Dataset`` would.
        broken: ids that cannot be read.
    """

    labels: np.ndarray
    fixed_size: tuple[int, int] | None = None
    encoded: bool = False
    broken: tuple[int, ...] = ()
    classes = ("low", "high")
    in_chans, images, note, backends = 3, None, "", ("torch",)

    @property
    def identity(self) -> str:
        return f"gradients {self.fixed_size} {self.labels.tolist()}"

    def location(self, sample: int) -> str:
        return f"gradients.tar:{sample:03}.png"

    def fetch(self, sample: int) -> StoredImage:
        if sample in self.broken:
            raise ValueError("the shard ends before it")
        pixels = gradient(sample, *(self.fixed_size or (20 + sample % 9, 20 + sample % 4)))
        return png(pixels) if self.encoded else pixels


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def gradients(**kwargs) -> GradientSource:
    return GradientSource(LABELS, **kwargs)


def arrays(size: tuple[int, int]) -> ArraySource:
    return ArraySource(np.stack([gradient(n, *size) for n in range(COUNT)]), LABELS, ("low", "high"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RandomAccessSource:
    """The gradients as PNG files of an image folder, with the same sample ids."""
    root = tmp_path_factory.mktemp("gradients")
    for sample, label in enumerate(LABELS):
        place = root / "train" / f"class{label}" / f"{sample:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(gradients().fetch(sample)))  # type: ignore[arg-type]
    return open_source("imagefolder", str(root), "train", True)


def served(
    source: RandomAccessSource, look: TransformConfig, augment, workers: int = 0, backend: str = "auto", lists=LISTS
):
    feed = ImageLoader(source, look, CPU, workers, backend=backend)
    out = list(feed.batches(lists, augment))
    feed.close()
    return torch.cat([batch.images for batch in out]), torch.cat([batch.labels for batch in out])


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("look", range(len(LOOKS)))
def test_images_of_any_size_are_those_of_an_image_folder(folder, encoded, look):
    images, labels = served(folder, *LOOKS[look])
    found, marks = served(gradients(encoded=encoded), *LOOKS[look])
    assert torch.equal(found, images)
    assert torch.equal(marks, labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("look", range(len(LOOKS)))
def test_images_of_one_size_are_those_of_arrays(look, workers):
    """Fetched one by one in the loader's workers, and held in memory: the same pixels, not cropped."""
    images, labels = served(arrays((24, 24)), *LOOKS[look], backend="torch")
    found, marks = served(gradients(fixed_size=(24, 24)), *LOOKS[look], workers)
    assert torch.equal(found, images)
    assert torch.equal(marks, labels)
    assert torch.allclose(served(arrays((24, 24)), *LOOKS[look], backend="memory")[0], images)


def test_pixels_in_memory_are_served_by_the_memory_backend():
    class Held(GradientSource):
        images, backends = arrays((24, 24)).images, ("memory", "torch")

    source = Held(LABELS, (24, 24))
    feed = ImageLoader(source, LOOKS[1][0], CPU)
    assert torch.equal(served(source, *LOOKS[1])[0], served(arrays((24, 24)), *LOOKS[1])[0])
    assert not feed.skips, "nothing in memory can fail"
    with pytest.raises(PruneError, match=r"'memory' cannot read images gradients\.tar:000\.png; torch can"):
        ImageLoader(gradients(), LOOKS[1][0], CPU, backend="memory")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fixed_size", [None, (24, 24)])
@pytest.mark.parametrize("look", range(len(LOOKS)))
def test_samples_that_cannot_be_read(look, fixed_size, workers):
    source, (transform, moment) = gradients(fixed_size=fixed_size, broken=(3, 41)), LOOKS[look]
    lists = [np.array([2, 3, 4]), np.array([41, 7])]
    with pytest.raises(PruneError, match=r"sample 3: the image gradients\.tar:003\.png cannot be decoded: the shard"):
        list(ImageLoader(source, transform, CPU, workers).batches(lists, moment))
    feed = ImageLoader(source, transform, CPU, workers, on_error="skip")
    assert feed.skips
    found = list(feed.batches(lists, moment))
    assert [batch.ids.tolist() for batch in found] == [[2, 4], [7]]
    assert feed.skipped == {3: "the shard ends before it", 41: "the shard ends before it"}
    whole = served(gradients(fixed_size=fixed_size), transform, moment, lists=[np.array([2, 4, 7])])[0]
    assert torch.equal(torch.cat([batch.images for batch in found]), whole)
    assert len(next(feed.batches([np.array([3])])).ids) == 0
    with pytest.raises(PruneError, match=r"none of the 1 images .* the first being gradients\.tar:003\.png"):
        list(feed.batches([np.array([3])], (0, 0)))


@pytest.mark.parametrize(
    ("fixed_size", "pixels", "said"),
    [
        (None, np.zeros((8, 8), np.uint8), r"it is uint8 \(8, 8\), not uint8 \(height, width, 3\)"),
        (None, b"no image", "cannot identify image file"),
        ((8, 8), np.zeros((8, 9, 3), np.uint8), r"it is uint8 \(8, 9, 3\), not uint8 \(8, 8, 3\)"),
        ((8, 8), np.zeros((8, 8, 3)), r"it is float64 \(8, 8, 3\), not uint8"),
        ((8, 8), b"bytes", r"it is bytes, not uint8 \(8, 8, 3\)"),
    ],
)
def test_what_is_not_an_image_is_an_error_that_says_why(fixed_size, pixels, said):
    class Wrong(GradientSource):
        def fetch(self, sample: int) -> StoredImage:
            return pixels

    with pytest.raises(PruneError, match=rf"gradients\.tar:001\.png cannot be decoded: {said}"):
        served(Wrong(np.arange(4) % 2, fixed_size), *LOOKS[0], lists=[np.array([1])])


def test_a_method_scores_them_as_it_scores_arrays():
    """Order, labels and pixels of the scoring context: scores are equal bit for bit, so plans are too."""
    model, found = tiny.network(in_chans=3), []
    for source in (arrays((8, 8)), gradients(fixed_size=(8, 8))):
        digits = tiny.bench(model, feed=tiny.feed_of(source), images=COUNT - 1)
        ranking = tiny.method("taylor")
        scores = ranking.score(digits)
        found.append((scores, ranking.select(scores, digits.graph, SelectionRequest(keep_ratio=0.5)).fingerprint))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(scores, found[1][0][name]) for name, scores in found[0][0].items())


def test_a_run_checks_them_before_scoring_and_lists_what_it_left_out():
    recipe = loading.load("quickstart", ["data.on_error=skip"], methods.options_of)
    images = RunImages(recipe, tiny.machine(), Tracker(False))
    source = gradients(broken=(3, 41))
    feed = ImageLoader(source, LOOKS[0][0], CPU, on_error="skip", skipped=images.unreadable[True])
    exact, ids = images.readable(feed, np.arange(COUNT))
    assert exact.exact
    assert ids.tolist() == [n for n in range(COUNT) if n not in (3, 41)]
    images.splits = dict.fromkeys((True, False), replace(images.splits[True], source=source))  # type: ignore[assignment]
    files = [item["file"] for item in images.take_unreadable()]
    assert files == ["gradients.tar:003.png", "gradients.tar:041.png"]


def test_registration_and_identity(monkeypatch, tmp_path):
    """One entry in ``OPENERS`` registers a form; the source itself says which backends can read it."""
    asked: list[SplitSpec] = []
    monkeypatch.setitem(datasets.OPENERS, "gradients", lambda spec: asked.append(spec) or gradients())
    opened = open_split("auto", "gradients", str(tmp_path), "train", True)
    assert (opened.backend, opened.why) == ("torch", f"there is no {tmp_path / 'gradients.train.beton'}")
    assert (asked[0].root, asked[0].split, asked[0].train) == (str(tmp_path), "train", True)
    assert open_split("auto", "gradients", None, "train", True).why == "it has no place for a .beton"
    assert open_split("torch", "gradients", None, "train", True).why == "data.backend says so"
    with pytest.raises(PruneError, match="'memory' is for arrays"):
        open_split("memory", "gradients", str(tmp_path), "train", True)
    assert set(datasets.OPENERS) - {"gradients"} == set(SOURCES)


@pytest.mark.parametrize("fixed_size", [None, (24, 24)])
def test_a_beton_of_them(ffcv, monkeypatch, tmp_path, fixed_size):
    from dist_prune.data.ffcv.encoder import Settings
    from dist_prune.data.ffcv.writer import write_beton
    from tests.data.test_ffcv import Silent

    source, out = gradients(fixed_size=fixed_size, encoded=fixed_size is None), tmp_path / "gradients.train.beton"
    for number in (1, 2):
        write_beton(source, {}, out, Settings(64, 90, "raw"), number, lambda text: None, Silent)
    facts = read_sidecar(out)
    assert (facts["source_digest"], facts["arrays"]) == (source.identity, fixed_size is not None)
    stored = open_beton(out)
    assert (stored.identity, stored.fixed_size) == (source.identity, fixed_size)
    for look, moment in (LOOKS[0], LOOKS[1]):
        assert torch.equal(served(stored, look, moment)[0], served(source, look, moment)[0])  # type: ignore[arg-type]
    monkeypatch.setitem(datasets.OPENERS, "gradients", lambda spec: source)
    assert open_split("auto", "gradients", str(tmp_path), "train", True).backend == "ffcv"
    monkeypatch.setitem(datasets.OPENERS, "gradients", lambda spec: replace(source, labels=1 - source.labels))
    assert "other images or labels" in open_split("auto", "gradients", str(tmp_path), "train", True).why
    with pytest.raises(PruneError, match=r"sample 5: the image gradients\.tar:005\.png cannot be decoded: the shard"):
        write_beton(replace(source, broken=(5,), labels=1 - source.labels), {}, tmp_path / "x.beton", Settings(), 1,
             lambda text: None, Silent)  # fmt: skip


def test_the_shipped_forms_have_every_member(folder):
    for source in (folder, arrays((8, 8)), gradients()):
        assert isinstance(source, RandomAccessSource)


def test_nothing_asks_for_the_class_of_a_source():
    for file in (ROOT / "dist_prune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not {name for name in named if name.endswith("Source")}, f"{file.name}:{node.lineno}"
