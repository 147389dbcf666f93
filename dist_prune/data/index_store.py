"""A file of named arrays with a text and a digest: the form in which indexes of image folders and shards are kept."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dist_prune.errors import PruneError
from dist_prune.fileio import write_atomic

T = TypeVar("T")


def save(path: Path, kind: str, arrays: Mapping[str, np.ndarray], text: Mapping[str, Any], digest: str) -> None:
    """Write an index.

    Args:
        path: the file.
        kind: what it is an index of, with the version of its form: ``folder-3``.
        arrays: name -> array of numbers.
        text: what is no array; plain values.
        digest: of the index; ``load`` compares it.

    Raises:
        PruneError: the disk refuses.
    """
    out = io.BytesIO()
    body = np.frombuffer(json.dumps({"kind": kind, "digest": digest, "text": dict(text)}).encode(), dtype=np.uint8)
    np.savez(out, text=body, **arrays)  # type: ignore[arg-type]
    write_atomic(path, out.getvalue())


def load(path: Path, kind: str, make: Callable[[Mapping[str, np.ndarray], dict[str, Any]], T]) -> T | None:
    """Read an index.

    Args:
        path: the file.
        kind: as for ``save``.
        make: makes the index, which has a ``digest``, from the arrays and the text.

    Returns:
        The index; None if there is no file, or if it is damaged, of another kind or not what its digest says.
    """
    try:
        if not path.is_file():  # opening a FIFO would wait for its writer
            return None
        with np.load(path, allow_pickle=False) as arrays:
            body = json.loads(arrays["text"].tobytes())
            if body["kind"] != kind:
                return None
            index = make(arrays, body["text"])
        return index if index.digest == body["digest"] else None  # type: ignore[attr-defined]
    except Exception:  # a damaged file makes the readers of npz, zip and zlib raise many types
        return None


def save_first(index: T, locations: tuple[Path, ...], save_to: Callable[[T, Path], None]) -> Path | None:
    """Save an index at the first location that takes it.

    Args:
        index: the index.
        locations: best first.
        save_to: writes it; raises a PruneError where it cannot.

    Returns:
        Where it is now; None if every location is read-only or full.
    """
    for path in locations:
        try:
            save_to(index, path)
            return path
        except PruneError:
            continue
    return None
