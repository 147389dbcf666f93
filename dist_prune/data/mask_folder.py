"""Image files with a mask file each: ROOT/<split>/images, ROOT/<split>/labels and ROOT/classes.txt.

A mask is an 8-bit image (gray or palette) of the size of its image. Its values are class numbers, and 255 for void.
Its pixels are those of the image as it is stored, so the EXIF orientation of such images is not applied.
Every mask is read once; the result is kept in the user's cache under the digest of the files' names, sizes and times.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dist_prune.data.folder_scan import IMAGE_FILES
from dist_prune.data.random_access import Say, SplitSpec
from dist_prune.data.source_forms import DecodedImages
from dist_prune.errors import PruneError, abbreviate
from dist_prune.fileio import user_cache, write_atomic

VOID = 255  # value of pixels without a class
MASK_FOLDERS = ("labels", "masks")
CLASSES = "classes.txt"
EXPECTED_FORM = (
    "maskfolder: ROOT/train/images/<name>.jpg with ROOT/train/labels/<name>.png (8 bits: class numbers, 255 for void), "
    "the same for ROOT/val, and ROOT/classes.txt with one class name a line (data.train_split and data.eval_split name "
    "other sub-folders)"
)
READERS = 16  # threads that check masks; Pillow decodes without the interpreter's lock


@dataclass(frozen=True)
class MaskFolderSource(DecodedImages):
    """Image files, decoded to RGB when they are loaded, with a mask file each.

    Attributes:
        images_folder: the folder of the images.
        masks_folder: the folder of the masks.
        names: file names of the images, in text order; the position is the sample id.
        masks: file names of their masks.
        classes: class names in the order of their numbers.
        digest: of all names, sizes and times, and of the classes.
        pixels: number of mask pixels of each class, and of void at the end.
    """

    images_folder: Path
    masks_folder: Path
    names: tuple[str, ...]
    masks: tuple[str, ...]
    classes: tuple[str, ...]
    digest: str
    pixels: tuple[int, ...]
    note: str = ""
    numbering = ""  # a mask holds class numbers
    target_kind = "masks"

    @property
    def labels(self) -> np.ndarray:
        """(n,) zeros: an image has no class of its own, so calibration images are drawn uniformly."""
        return np.zeros(len(self.names), dtype=np.int64)

    def location(self, sample: int) -> str:
        """Path of the sample's image, for messages."""
        return str(self.images_folder / self.names[sample])

    def fetch(self, sample: int) -> Path:
        """Path of the sample's image."""
        return self.images_folder / self.names[sample]

    def fetch_mask(self, sample: int) -> Path:
        """Path of the sample's mask."""
        return self.masks_folder / self.masks[sample]


def read_mask(path: Path) -> np.ndarray:
    """Decode a mask.

    Args:
        path: an 8-bit gray or palette image.

    Returns:
        (H, W) uint8 class numbers, 255 for void.

    Raises:
        ValueError: it is missing or damaged, or has no class numbers.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P"):
                raise ValueError(
                    f"the mask {path.name} has the mode {file.mode}; a mask is an 8-bit gray or palette image of class "
                    "numbers"
                )
            return np.asarray(file).copy()
    except FileNotFoundError as error:
        raise ValueError(f"the mask {path} no longer exists") from error
    except ValueError:
        raise
    except Exception as error:  # decoders raise many types on a damaged file
        raise ValueError(f"the mask {path}: {error or repr(error)}") from error


def open_masks(spec: SplitSpec) -> MaskFolderSource:
    """Open a split of images with masks.

    Args:
        spec: the split that the recipe asks for.

    Raises:
        PruneError: folders, classes or masks are missing, or a mask has another size than its image or a class number
            that is not one.
    """
    root = spec.path(EXPECTED_FORM)
    key = "data.train_split" if spec.train else "data.eval_split"
    split = root / spec.split
    images = split / "images"
    if not images.is_dir():
        found = abbreviate(sorted(p.name for p in root.iterdir() if (p / "images").is_dir())) or "none"
        raise PruneError(f"{key}: there is no folder {images}. Splits with images: {found}. {EXPECTED_FORM}")
    masks = next((split / name for name in MASK_FOLDERS if (split / name).is_dir()), None)
    if masks is None:
        raise PruneError(f"data.root: {split} has no folder {' or '.join(MASK_FOLDERS)}. {EXPECTED_FORM}")
    classes = _read_classes(root / CLASSES)
    names = _file_names(images)
    if not names:
        raise PruneError(f"data.root: {images} holds no image files")
    by_stem = {Path(name).stem: name for name in _file_names(masks)}
    without = [name for name in names if Path(name).stem not in by_stem]
    if without:
        raise PruneError(
            f"data.root: {len(without)} of {len(names)} images in {images} have no mask in {masks}: "
            f"{abbreviate(without, 4)}. A mask has its image's name, with the suffix of a lossless format (.png)"
        )
    own = tuple(by_stem[Path(name).stem] for name in names)
    digest = _digest(images, masks, names, own, classes)
    pixels = _checked_pixels(images, masks, names, own, classes, digest, spec.say)
    return MaskFolderSource(images, masks, tuple(names), own, classes, digest, pixels)


def count_classes(root: str | None) -> int | None:
    """Number of classes of a folder with masks; None if there is no such folder.

    Raises:
        PruneError: the file of class names is missing or damaged.
    """
    folder = Path(root).expanduser() if root else None
    return len(_read_classes(folder / CLASSES)) if folder is not None and folder.is_dir() else None


def _read_classes(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        raise PruneError(f"data.root: there is no {file}, the names of the classes, one a line. {EXPECTED_FORM}")
    names = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or len(names) > VOID or twice:
        why = f"{', '.join(twice[:4])} stands there twice" if twice else f"it has {len(names)}"
        raise PruneError(f"data.root: {file} has to name 2 to {VOID} different classes, one a line; {why}")
    return tuple(names)


def _file_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    return sorted(name for name in names if name.lower().endswith(IMAGE_FILES))


def _digest(images: Path, masks: Path, names: list[str], own: tuple[str, ...], classes: tuple[str, ...]) -> str:
    """Digest of names and sizes of all files, and of the classes. The files are not read."""
    whole = hashlib.sha256("\0".join(classes).encode())
    for name, mask in zip(names, own, strict=True):
        sizes = (images / name).stat().st_size, (masks / mask).stat().st_size
        whole.update(f"\0{name}\0{mask}\0{sizes}".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _checked_pixels(
    images: Path, masks: Path, names: list[str], own: tuple[str, ...], classes: tuple[str, ...], digest: str, say: Say
) -> tuple[int, ...]:
    """Check all masks, or find that they were checked before; the number of pixels of each class and of void."""
    times = hashlib.sha256(digest.encode())
    for folder, files in ((images, names), (masks, own)):
        times.update(str(folder.resolve()).encode("utf-8", "surrogateescape"))
        times.update(np.array([(folder / file).stat().st_mtime_ns for file in files], dtype=np.int64).tobytes())
    file = user_cache() / f"masks-{times.hexdigest()[:32]}.json"
    try:
        counts = json.loads(file.read_text())
        if len(counts) == len(classes) + 1 and all(isinstance(count, int) for count in counts):
            return tuple(counts)
    except (OSError, ValueError, TypeError):
        pass
    say(f"data: {len(names):,} masks in {masks} are checked (once)")
    counts = _check_masks(images, masks, names, own, classes)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(counts))
    except (PruneError, OSError):  # no place to keep it: the next start checks again
        pass
    return tuple(counts)


def _check_masks(
    images: Path, masks: Path, names: list[str], own: tuple[str, ...], classes: tuple[str, ...]
) -> list[int]:
    total, problems = np.zeros(VOID + 1, dtype=np.int64), []

    def check(pair: tuple[str, str]) -> np.ndarray | str:
        name, mask = pair
        try:
            pixels = read_mask(masks / mask)
            with Image.open(images / name) as image:
                size = image.size
        except Exception as error:
            return f"{name}: {error}"
        if size != pixels.shape[::-1]:
            return f"the mask {mask} has {pixels.shape[1]}x{pixels.shape[0]} pixels, its image {size[0]}x{size[1]}"
        counts = np.bincount(pixels.ravel(), minlength=VOID + 1)
        wrong = [value for value in np.flatnonzero(counts).tolist() if len(classes) <= value < VOID]
        if wrong:
            return (
                f"the mask {mask} has the value {', '.join(map(str, wrong[:4]))}, and class numbers are 0 to "
                f"{len(classes) - 1} ({CLASSES} names {len(classes)}) and {VOID} for void"
            )
        return counts

    with ThreadPoolExecutor(READERS) as pool:
        for answer in pool.map(check, zip(names, own, strict=True)):
            if isinstance(answer, str):
                problems.append(answer)
            else:
                total += answer
    if problems:
        raise PruneError(
            f"data.root: {len(problems)} of {len(names)} masks in {masks} cannot be used: {'; '.join(problems[:4])}"
        )
    return [*total[: len(classes)].tolist(), int(total[VOID])]


def mask_reader(source: object) -> Callable[[int], Path] | None:
    """The function from a sample id to its mask file; None for sources without masks."""
    return getattr(source, "fetch_mask", None)
