"""Which backend serves a split: ``data.backend`` auto, torch, ffcv or memory."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_prune.errors import PruneError
from dist_prune.runtime.data.files import FileSupplier
from dist_prune.runtime.data.index import Say
from dist_prune.runtime.data.memory import MemorySupplier
from dist_prune.runtime.data.sources import ArraySource, FolderSource, open_source
from dist_prune.runtime.data.supply import Supplier

AnySource = ArraySource | FolderSource


@dataclass(frozen=True)
class Opened:
    """One split, ready to be served.

    Attributes:
        source: ids, labels, classes.
        backend: ``torch``, ``ffcv`` or ``memory``.
        why: the reason, for the log.
    """

    source: AnySource
    backend: str
    why: str


def open_split(
    backend: str, source: str, root: str | None, split: str, train: bool, say: Say = lambda text: None
) -> Opened:
    """Open the training or the evaluation split behind the backend that the recipe asks for.

    Args:
        backend: the recipe's ``data.backend``.
        source, root, split, train, say: see ``open_source``.

    Raises:
        PruneError: missing or malformed data, or a backend that cannot serve it, with what to do.
    """
    place = beton_of(source, root, split, train)
    if backend == "ffcv":
        return _ffcv(place)
    plain = open_source(source, root, split, train, say)
    if isinstance(plain, FolderSource):
        if backend == "memory":
            raise PruneError(
                "data.backend: 'memory' is for arrays (npz, cifar10, digits ...); image files are served by torch, or "
                "by ffcv from a .beton file"
            )
        asked = "data.backend says so" if backend == "torch" else _no_beton(place)
        return Opened(plain, "torch", f"{asked}; {plain.note}")
    if backend == "torch":
        return Opened(plain, "torch", "data.backend says so")
    return Opened(plain, "memory", "data.backend says so" if backend == "memory" else "arrays fit into memory")


def supplier(
    source: AnySource, backend: str, device: torch.device, workers: int, on_error: str, skipped: dict[int, str]
) -> Supplier:
    """The supplier of a split; PruneError where the backend cannot serve this kind of source."""
    if isinstance(source, ArraySource) and backend in ("auto", "memory"):
        return MemorySupplier(source, device)
    if backend in ("auto", "torch"):
        return FileSupplier(source, workers, on_error, skipped, pin=device.type == "cuda")
    raise PruneError(f"data.backend: {backend!r} cannot serve {type(source).__name__}")


def beton_of(source: str, root: str | None, split: str, train: bool) -> Path | None:
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


def has_ffcv() -> bool:
    """Whether ffcv is installed."""
    return importlib.util.find_spec("ffcv") is not None


def _no_beton(place: Path | None) -> str:
    return f"there is no {place}" if place is None or not place.is_file() else "ffcv is not installed"


def _ffcv(place: Path | None) -> Opened:
    raise PruneError(f"data.backend: the ffcv loader is not there yet (it will read {place})")
