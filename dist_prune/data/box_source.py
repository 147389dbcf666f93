"""Image files with boxes: the opened split, and the checks of boxes against their images.

Boxes are in pixels of the image as it is stored, so the EXIF orientation of such images is not applied. The size of
every image is read once; the result is kept in the user's cache under the digest of the files' paths, sizes and times.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dist_prune.data.random_access import Say
from dist_prune.errors import PruneError
from dist_prune.fileio import user_cache, write_atomic

READERS = 16  # threads that read the sizes of images
NEAR = 1.0  # pixels by which a box may reach over the edge of its image, where it is cut; tools round to pixels
COLUMNS = 6  # of a target: class, x0, y0, x1, y1, crowd


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of an annotation file.

    Attributes:
        file: its path.
        boxes: (class number, x0, y0, x1, y1, 1 for a crowd) of each box, in pixels.
        size: (width, height) that the annotation file gives; None: it gives none.
    """

    file: Path
    boxes: tuple[tuple[float, ...], ...]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class BoxSource:
    """Image files, decoded to RGB when they are loaded, with boxes.

    Attributes:
        files: paths of the images, in text order; the position is the sample id.
        sizes: (n, 2) int64 width and height of the stored images.
        targets: (n, m, 6) float32: class, x0, y0, x1, y1 in pixels of the stored image, and 1 for a crowd; rows without
            a box have class -1. m is the largest number of boxes of an image, at least 1.
        classes: class names in the order of their numbers.
        digest: of names, file sizes, boxes and classes.
        note: what was left out or cut, for the log.
    """

    files: tuple[Path, ...]
    sizes: np.ndarray
    targets: np.ndarray
    classes: tuple[str, ...]
    digest: str
    note: str = ""
    in_chans = 3
    fixed_size = None
    images = None
    backends = ("torch",)
    target_kind = "boxes"

    @property
    def labels(self) -> np.ndarray:
        """(n,) zeros: an image has no class of its own, so calibration images are drawn uniformly."""
        return np.zeros(len(self.files), dtype=np.int64)

    @property
    def identity(self) -> str:
        """Digest of file names, sizes, boxes and classes."""
        return self.digest

    def location(self, sample: int) -> str:
        """Path of the sample's image, for messages."""
        return str(self.files[sample])

    def fetch(self, sample: int) -> Path:
        """Path of the sample's image."""
        return self.files[sample]


def make_source(images: Sequence[AnnotatedImage], classes: Sequence[str], annotations: Path, say: Say) -> BoxSource:
    """Check the boxes of a split against their images.

    Args:
        images: with their boxes.
        classes: class names in the order of their numbers.
        annotations: the annotation file, for messages.
        say: takes a line for the user before something that takes long.

    Raises:
        PruneError: there is no image or no box, an image cannot be read or has another size than the file says, or a
            box has an unknown class or lies outside of its image.
    """
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if not classes or twice:
        why = f"{', '.join(twice[:4])} stands there twice" if twice else "it names none"
        raise PruneError(f"data.root: {annotations} has to name different classes; {why}")
    if not images:
        raise PruneError(f"data.root: {annotations} names no image of this split")
    images = sorted(images, key=lambda image: str(image.file))
    sizes = _sizes([image.file for image in images], say)
    kept, problems, empty, cut = [], [], 0, 0
    for image, size in zip(images, sizes, strict=True):
        if isinstance(size, str):
            problems.append(f"{image.file.name}: {size}")
            continue
        if image.size is not None and image.size != size:
            problems.append(
                f"{image.file.name} has {size[0]}x{size[1]} pixels, {annotations.name} says "
                f"{image.size[0]}x{image.size[1]}"
            )
            continue
        rows = []
        for box in image.boxes:
            row, trouble = _checked(box, size, classes)
            if trouble:
                problems.append(f"{image.file.name}: {trouble}")
            elif row is None:
                empty += 1
            else:
                cut += row[1:5] != box[1:5]
                rows.append(row)
        kept.append(rows)
    if problems:
        raise PruneError(
            f"data.root: {len(problems)} entries of {annotations} cannot be used: {'; '.join(problems[:4])}"
        )
    most = max(map(len, kept))
    if not most:
        raise PruneError(
            f"data.root: {annotations} has no box in any of the {len(images)} images of this split. Images without "
            "boxes are allowed, a split without boxes is not"
        )
    targets = np.zeros((len(kept), most, COLUMNS), dtype=np.float32)
    targets[..., 0] = -1
    for number, rows in enumerate(kept):
        targets[number, : len(rows)] = rows or np.zeros((0, COLUMNS))
    files = tuple(image.file for image in images)
    notes = [f"{empty} boxes without area were left out"] if empty else []
    notes += [f"{cut} boxes that reached less than {NEAR:g} pixel over the edge were cut there"] if cut else []
    return BoxSource(
        files, np.array(sizes), targets, tuple(classes), _digest(files, targets, classes), "; ".join(notes)
    )


def _checked(
    box: tuple[float, ...], size: tuple[int, int], classes: Sequence[str]
) -> tuple[tuple[float, ...] | None, str]:
    """The box within its image, or None for one without area; and what is wrong with it."""
    kind, x0, y0, x1, y1, crowd = box
    text = f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} (x0, y0, x1, y1)"
    if not 0 <= kind < len(classes) or kind != int(kind):
        return None, f"{text} has the class {kind:g}, and class numbers are 0 to {len(classes) - 1}"
    if not np.isfinite((x0, y0, x1, y1)).all():
        return None, f"{text} is not finite"
    width, height = size
    if min(x0, y0) < -NEAR or x1 > width + NEAR or y1 > height + NEAR:
        return None, f"{text} lies outside of its image of {width}x{height} pixels"
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if x1 < x0 or y1 < y0:
        return None, f"{text} ends before it begins"
    return ((kind, x0, y0, x1, y1, crowd), "") if x1 > x0 and y1 > y0 else (None, "")


def _digest(files: Sequence[Path], targets: np.ndarray, classes: Sequence[str]) -> str:
    """Digest of names and sizes of all files, of boxes and classes. The files are not read."""
    whole = hashlib.sha256("\0".join(classes).encode())
    for file in files:
        whole.update(f"\0{file.name}\0{file.stat().st_size}".encode("utf-8", "surrogateescape"))
    whole.update(targets.tobytes())
    return whole.hexdigest()


def _sizes(files: Sequence[Path], say: Say) -> list[tuple[int, int] | str]:
    """(width, height) of every image, or why it cannot be read; from the cache if no file has changed."""
    key = hashlib.sha256()
    for file in files:
        try:
            state = file.stat()
            key.update(f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        except OSError:
            key.update(f"{file}\0missing\0".encode("utf-8", "surrogateescape"))
    place = user_cache() / f"sizes-{key.hexdigest()[:32]}.json"
    try:
        found = np.array(json.loads(place.read_text()))
        if found.shape == (len(files), 2) and found.dtype == np.int64 and (found > 0).all():
            return [(int(width), int(height)) for width, height in found]
    except (OSError, ValueError, TypeError):
        pass
    say(f"data: the sizes of {len(files):,} images are read (once)")
    with ThreadPoolExecutor(READERS) as pool:
        sizes = list(pool.map(_size, files))
    if not any(isinstance(size, str) for size in sizes):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, json.dumps(sizes))
        except (PruneError, OSError):  # no place to keep it: the next start reads again
            pass
    return sizes


def _size(file: Path) -> tuple[int, int] | str:
    try:
        with Image.open(file) as image:
            return image.size
    except FileNotFoundError:
        return "there is no such file"
    except Exception as error:  # decoders raise many types on a damaged file
        return str(error) or repr(error)
