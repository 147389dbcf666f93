"""Which backend serves a split: ``data.backend`` auto, torch, ffcv or memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_prune.errors import PruneError
from dist_prune.runtime.data.beton import BetonSource, BetonSupplier, open_beton
from dist_prune.runtime.data.files import FileSupplier
from dist_prune.runtime.data.index import Say
from dist_prune.runtime.data.memory import MemorySupplier
from dist_prune.runtime.data.sources import ArraySource, FolderSource, open_source
from dist_prune.runtime.data.supply import Supplier

AnySource = ArraySource | FolderSource | BetonSource


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
    backend: str, source: str, root: str | None, split: str, train: bool, say: Say = lambda text: None,
    resized: Callable[[AnySource], int] = lambda source: 0, layout: str | None = None,
) -> Opened:  # fmt: skip
    """Open the training or the evaluation split behind the backend that the recipe asks for.

    ``auto`` takes a .beton for evaluation only where it keeps the pixels: accuracies are those of the files themselves.

    Args:
        backend: the recipe's ``data.backend``.
        source, root, split, train, say, layout: see ``open_source``.
        resized: of a source: the side that the recipe resizes shorter sides to, before it crops.

    Raises:
        PruneError: missing or malformed data, or a backend that cannot serve it, with what to do.
    """
    place = beton_of(source, root, split, train)
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
    if isinstance(plain, FolderSource):
        if backend == "memory":
            raise PruneError(
                "data.backend: 'memory' is for arrays (npz, cifar10, digits ...); image files are served by torch, or "
                "by ffcv from a .beton file"
            )
        if backend == "torch":
            return Opened(plain, "torch", f"data.backend says so; {plain.note}")
        try:
            return _ffcv(place, lambda: plain, f"{place} holds the same images", resized, exact=not train)
        except PruneError as error:
            return Opened(
                plain, "torch", f"{error if place and place.is_file() else f'there is no {place}'}; {plain.note}"
            )
    if backend == "torch":
        return Opened(plain, "torch", "data.backend says so")
    return Opened(plain, "memory", "data.backend says so" if backend == "memory" else "arrays fit into memory")


def supplier(
    source: AnySource, backend: str, device: torch.device, workers: int, on_error: str, skipped: dict[int, str]
) -> Supplier:
    """The supplier of a split; PruneError where the backend cannot serve this kind of source."""
    if isinstance(source, BetonSource):
        if backend in ("auto", "ffcv"):
            return BetonSupplier(source, workers, pin=device.type == "cuda")
        raise PruneError(f"data.backend: {backend!r} cannot read {source.path}; ffcv can")
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


def _ffcv(
    place: Path | None,
    beside: Callable[[], ArraySource | FolderSource | None],
    why: str,
    resized: Callable[[AnySource], int],
    exact: bool = False,
) -> Opened:
    """The .beton, where it holds what lies beside it (where that is there), large enough; PruneError elsewhere."""
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
    small = 0 if found.side else found.upsampled(side)
    if small and limit < side:
        raise PruneError(
            f"{place} was written with --max-resolution {limit}, but the recipe resizes shorter sides to {side} pixels "
            f"(data.image_size / data.crop): run dist-prune make-ffcv with a larger one, or write data.backend=torch"
        )
    why += f"; it keeps {found.lost}" if found.lost else ""
    why += f"; the shorter sides of {small:,} shrunk ones are blown up to {side} pixels again" if small else ""
    return Opened(found, "ffcv", why)
