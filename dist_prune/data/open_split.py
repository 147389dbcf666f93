"""Open a split, and choose the backend that reads it: ``data.backend`` auto, torch, ffcv or memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_prune.config.data import SHARDS
from dist_prune.data.datasets import OPENERS, DatasetKeys, open_source
from dist_prune.data.ffcv.backend import FfcvBackend, open_beton
from dist_prune.data.file_backend import FileBackend
from dist_prune.data.memory_backend import MemoryBackend
from dist_prune.data.random_access import ImageSource, RandomAccessSource, Root, Say
from dist_prune.data.shard_names import shard_paths
from dist_prune.data.transform_config import ImageBackend
from dist_prune.errors import PruneError

NO_BETON = (
    "maskfolder",
    "boxfolder",
    "coco",
    "npz_labels",
    "npz_values",
    "checkpoint",
)  # a .beton holds class numbers alone
# data.backend -> factory (source, device, workers, on_error, skipped) -> backend
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
    backend: str,
    source: str,
    root: Root,
    split: str,
    train: bool,
    say: Say = lambda text: None,
    resized: Callable[[ImageSource], int] = lambda source: 0,
    layout: str | None = None,
    dataset: DatasetKeys | None = None,
) -> OpenSplit:
    """Open the training or the evaluation split with the backend that the recipe asks for.

    ``auto`` takes ``memory`` for arrays in memory. For all other images it takes ``ffcv`` if there is a .beton made
    from the same images, else ``torch``. For evaluation the .beton must also keep the pixels unchanged, so that
    accuracies are those of the original files.

    Args:
        backend: the recipe's ``data.backend``.
        source: the recipe's ``data.source``.
        root: the recipe's ``data.root``.
        split: sub-folder name of an image folder.
        train: whether to open the training split.
        say: takes a line for the user before something that takes long.
        resized: maps a source to the side in pixels that the recipe resizes shorter sides to before it crops.
        layout: the recipe's ``data.layout`` of an .npz file.
        dataset: the recipe's keys for a Dataset.

    Returns:
        The split, its backend, and the reason for the choice.

    Raises:
        PruneError: missing or malformed data, or a backend that cannot read it; the message says what to do.
    """
    path = beton_path(source, root, split, train)
    only_beton = path is not None and path.is_file() and source == "imagefolder" and not path.with_suffix("").is_dir()
    if backend == "ffcv" or (backend == "auto" and only_beton):
        files_exist = not only_beton and _is_here(source, root, split, train, dataset)
        why = "data.backend says so" if backend == "ffcv" else f"there is no {split} folder beside {path}"
        return _open_ffcv(
            path,
            lambda: open_source(source, root, split, train, say, layout, dataset) if files_exist else None,
            why,
            resized,
        )
    original = open_source(source, root, split, train, say, layout, dataset)
    if original.images is None:
        if backend == "memory":
            raise PruneError(
                "data.backend: 'memory' is for arrays (npz, cifar10, digits ...); image files are served by torch, or "
                "by ffcv from a .beton file"
            )
        note = f"; {original.note}" if original.note else ""
        if backend == "torch":
            return OpenSplit(original, "torch", f"data.backend says so{note}")
        try:
            return _open_ffcv(path, lambda: original, f"{path} holds the same images", resized, exact=not train)
        except PruneError as error:
            absent = f"there is no {path}" if path else "it has no place for a .beton"
            return OpenSplit(original, "torch", f"{error if path and path.is_file() else absent}{note}")
    if backend == "torch":
        return OpenSplit(original, "torch", "data.backend says so")
    return OpenSplit(original, "memory", "data.backend says so" if backend == "memory" else "arrays fit into memory")


def _is_here(source: str, root: Root, split: str, train: bool, dataset: DatasetKeys | None) -> bool:
    """Whether the images that a .beton may have been made from are on this machine."""
    if source in SHARDS and root is not None:
        other = dataset.splits[train] if dataset and dataset.splits else ""
        try:
            return bool(shard_paths(root, split, train, f".{source}", other))
        except PruneError:
            return False
    return isinstance(root, str) and Path(root).expanduser().exists()


def create_backend(
    source: ImageSource, backend: str, device: torch.device, workers: int, on_error: str, skipped: dict[int, str]
) -> ImageBackend:
    """Create the backend object that reads a split.

    Args:
        source: the opened split.
        backend: ``memory``, ``torch``, ``ffcv``, or ``auto`` for the first of the source's ``backends``.
        device: where batches are needed; for GPUs, pixels are delivered in page-locked memory.
        workers: decoding processes or threads.
        on_error: ``fail`` or ``skip``.
        skipped: sample id -> reason; the backend adds the images that it leaves out.

    Raises:
        PruneError: the backend cannot read this source.
    """
    name = source.backends[0] if backend == "auto" else backend
    if name not in source.backends:
        readers = " or ".join(source.backends)
        raise PruneError(f"data.backend: {name!r} cannot read images {source.location(0)}; {readers} can")
    return BACKENDS[name](source, device, workers, on_error, skipped)


def beton_path(source: str, root: Root, split: str, train: bool) -> Path | None:
    """Path of the .beton of a split, beside its folder or file; None without a root and for a Dataset.

    ``ROOT/train.beton`` for ROOT/train and for tar or parquet files in ROOT (of a list, the first; of a pattern of
    folders, the folder above them), ``x.train.beton`` and ``x.test.beton`` for x.npz, ``ROOT/cifar10.train.beton`` for
    torchvision's data sets.
    """
    if root is None or source not in OPENERS or source in NO_BETON:
        return None
    path = Path(root if isinstance(root, str) else root[0]).expanduser()
    suffix = "train" if train else "test"
    if source == "imagefolder":
        return path / f"{split}.beton"
    if source in SHARDS:  # a pattern names files, which lie in its folder, or in folders that it names as well
        folder = path if path.is_dir() else path.parent
        while not folder.is_dir() and any(mark in str(folder) for mark in "{*?["):
            folder = folder.parent
        return folder / f"{split}.beton"
    return path.with_suffix(f".{suffix}.beton") if source == "npz" else path / f"{source}.{suffix}.beton"


def _open_ffcv(
    path: Path | None,
    open_original: Callable[[], RandomAccessSource | None],
    why: str,
    resized: Callable[[ImageSource], int],
    exact: bool = False,
) -> OpenSplit:
    """Open the .beton of a split.

    Args:
        path: the file.
        open_original: opens the images that it was made from; returns None if they are not there.
        why: the reason for this backend, for the log.
        resized: see ``open_split``.
        exact: refuse a file that does not keep the pixels unchanged.

    Raises:
        PruneError: no such file, made from other images, not exact, or its images are too small for the recipe.
    """
    if path is None:
        raise PruneError(
            "data.backend: ffcv reads .beton files; this source has no place for one: write auto or memory"
        )
    beton = open_beton(path)
    original = open_original()
    if original is not None and beton.facts["source_digest"] != original.identity:
        raise PruneError(
            f"{path} was made from other images or labels than those beside it now: run dist-prune make-ffcv "
            "again, or write data.backend=torch"
        )
    if exact and beton.storage_loss:
        raise PruneError(f"{path} keeps {beton.storage_loss}; data.backend=ffcv evaluates on it all the same")
    side, limit = resized(beton), beton.facts["max_resolution"]
    shrunk = 0 if beton.fixed_size else beton.count_upsampled(side)
    if shrunk and limit < side:
        raise PruneError(
            f"{path} was written with --max-resolution {limit}, but the recipe resizes shorter sides to {side} pixels "
            f"(data.image_size / data.crop): run dist-prune make-ffcv with a larger one, or write data.backend=torch"
        )
    why += f"; it keeps {beton.storage_loss}" if beton.storage_loss else ""
    why += f"; the shorter sides of {shrunk:,} shrunk ones are enlarged to {side} pixels" if shrunk else ""
    return OpenSplit(beton, "ffcv", why)
