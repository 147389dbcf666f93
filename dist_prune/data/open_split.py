"""Open a split, and choose the backend that reads it: ``data.backend`` auto, torch, ffcv or memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_prune.data.datasets import open_source
from dist_prune.data.ffcv.backend import FfcvBackend, open_beton
from dist_prune.data.file_backend import FileBackend
from dist_prune.data.memory_backend import MemoryBackend
from dist_prune.data.random_access import ImageSource, RandomAccessSource, Say
from dist_prune.data.transform_config import ImageBackend
from dist_prune.errors import PruneError

# data.backend -> what makes its supplier of (source, device, workers, on_error, skipped)
BACKENDS: dict[str, Callable[..., ImageBackend]] = {
    "memory": lambda source, device, *_: MemoryBackend(source, device),
    "torch": lambda source, device, *options: FileBackend(source, *options, pin=device.type == "cuda"),
    "ffcv": lambda source, device, workers, *_: FfcvBackend(source, workers, pin=device.type == "cuda"),
}


@dataclass(frozen=True)
class OpenSplit:
    """An opened split and the backend chosen for it.

    Attributes:
        source: labels, classes and images.
        backend: ``torch``, ``ffcv`` or ``memory``.
        why: the reason for the choice, for the log.
    """

    source: ImageSource
    backend: str
    why: str


def open_split(
    backend: str, source: str, root: str | None, split: str, train: bool, say: Say = lambda text: None,
    resized: Callable[[ImageSource], int] = lambda source: 0, layout: str | None = None,
) -> OpenSplit:  # fmt: skip
    """Open the training or the evaluation split with the backend that the recipe asks for.

    ``auto`` takes ``memory`` for arrays in memory. For all other images it takes ``ffcv`` if there is a .beton made
    from the same images, else ``torch``. For evaluation the .beton must also keep the pixels unchanged, so that
    accuracies are those of the original files.

    Args:
        backend: the recipe's ``data.backend``.
        source, root, split, train, say, layout: see ``SplitSpec``.
        resized: maps a source to the side in pixels that the recipe resizes shorter sides to before it crops.

    Returns:
        The split, its backend, and the reason for the choice.

    Raises:
        PruneError: missing or malformed data, or a backend that cannot read it; the message says what to do.
    """
    place = beton_path(source, root, split, train)
    only_beton = (
        place is not None and place.is_file() and source == "imagefolder" and not place.with_suffix("").is_dir()
    )
    if backend == "ffcv" or (backend == "auto" and only_beton):
        there = not only_beton and root is not None and Path(root).expanduser().exists()
        why = "data.backend says so" if backend == "ffcv" else f"there is no {split} folder beside {place}"
        return _ffcv(
            place, lambda: open_source(source, root, split, train, say, layout) if there else None, why, resized
        )
    plain = open_source(source, root, split, train, say, layout)
    if plain.images is None:
        if backend == "memory":
            raise PruneError(
                "data.backend: 'memory' is for arrays (npz, cifar10, digits ...); image files are served by torch, or "
                "by ffcv from a .beton file"
            )
        note = f"; {plain.note}" if plain.note else ""
        if backend == "torch":
            return OpenSplit(plain, "torch", f"data.backend says so{note}")
        try:
            return _ffcv(place, lambda: plain, f"{place} holds the same images", resized, exact=not train)
        except PruneError as error:
            absent = f"there is no {place}" if place else "it has no place for a .beton"
            return OpenSplit(plain, "torch", f"{error if place and place.is_file() else absent}{note}")
    if backend == "torch":
        return OpenSplit(plain, "torch", "data.backend says so")
    return OpenSplit(plain, "memory", "data.backend says so" if backend == "memory" else "arrays fit into memory")


def create_backend(
    source: ImageSource, backend: str, device: torch.device, workers: int, on_error: str, skipped: dict[int, str]
) -> ImageBackend:
    """The supplier that reads a split.

    Args:
        source: the opened split.
        backend: ``memory``, ``torch``, ``ffcv``, or ``auto`` for the first of the source's ``backends``.
        device: where batches are needed; on GPUs, pixels are handed over in page-locked memory.
        workers: decoding processes or threads.
        on_error: ``fail`` or ``skip``.
        skipped: sample id -> reason; the supplier adds the images that it leaves out.

    Raises:
        PruneError: the backend cannot read this source.
    """
    name = source.backends[0] if backend == "auto" else backend
    if name not in source.backends:
        able = " or ".join(source.backends)
        raise PruneError(f"data.backend: {name!r} cannot read images {source.location(0)}; {able} can")
    return BACKENDS[name](source, device, workers, on_error, skipped)


def beton_path(source: str, root: str | None, split: str, train: bool) -> Path | None:
    """Where the .beton of a split lies: beside its folder or file.

    ``ROOT/train.beton`` for ROOT/train, ``x.train.beton`` and ``x.test.beton`` for x.npz, ``ROOT/cifar10.train.beton``
    for torchvision's sets.
    """
    if root is None:
        return None
    path, part = Path(root).expanduser(), "train" if train else "test"
    if source == "imagefolder":
        return path / f"{split}.beton"
    return path.with_suffix(f".{part}.beton") if source == "npz" else path / f"{source}.{part}.beton"


def _ffcv(
    place: Path | None,
    beside: Callable[[], RandomAccessSource | None],
    why: str,
    resized: Callable[[ImageSource], int],
    exact: bool = False,
) -> OpenSplit:
    """Open the .beton of a split.

    Args:
        place: the file.
        beside: opens the images that it was made from; returns None if they are not there.
        why: the reason for this backend, for the log.
        resized: see ``open_split``.
        exact: refuse a file that does not keep the pixels unchanged.

    Raises:
        PruneError: no such file, made from other images, not exact, or its images are too small for the recipe.
    """
    if place is None:
        raise PruneError(
            "data.backend: ffcv reads .beton files; this source has no place for one: write auto or memory"
        )
    found = open_beton(place)
    plain = beside()
    if plain is not None and found.facts["source_digest"] != plain.identity:
        raise PruneError(
            f"{place} was made from other images or labels than those that lie beside it now: run dist-prune make-ffcv "
            "again, or write data.backend=torch"
        )
    if exact and found.lost:
        raise PruneError(f"{place} keeps {found.lost}; data.backend=ffcv evaluates on it all the same")
    side, limit = resized(found), found.facts["max_resolution"]
    small = 0 if found.fixed_size else found.upsampled(side)
    if small and limit < side:
        raise PruneError(
            f"{place} was written with --max-resolution {limit}, but the recipe resizes shorter sides to {side} pixels "
            f"(data.image_size / data.crop): run dist-prune make-ffcv with a larger one, or write data.backend=torch"
        )
    why += f"; it keeps {found.lost}" if found.lost else ""
    why += f"; the shorter sides of {small:,} shrunk ones are blown up to {side} pixels again" if small else ""
    return OpenSplit(found, "ffcv", why)
