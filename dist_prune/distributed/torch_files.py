"""Torch's files read without running code: torch's weights-only loading, and what it may see besides tensors.

A file that holds data sets beside its weights (the interpretable-pruning authors' checkpoints) is read as well: every
object in it becomes an empty ``Unread``, whose class is ours, and the entries that hold one are left out.
"""

import argparse
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_prune.errors import PruneError, shown

# classes in which training programs save their settings; loading one fills its fields and runs no code
SETTINGS_CLASSES = [argparse.Namespace, types.SimpleNamespace, pathlib.PurePosixPath, pathlib.PosixPath]
SMALL_FILE = 64_000_000  # bytes that the tensors of any file may take, however small it is
CHECKPOINT = "backbone.checkpoint"  # the recipe key of most files
# first bytes of other files: torch's before version 1.6 begin with a pickled number of their own
PICKLE, OLD_TORCH, NUMPY = b"\x80", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x93NUMPY"
# keeps tensors, arrays and plain values of a file, in dicts and lists as they are, and makes a network its state dict
CONVERT = (
    "python -c \"import torch, pickle; p = lambda v: p(v.state_dict()) if hasattr(v, 'state_dict') else "
    "{{k: w for k, x in v.items() if (w := p(x)) is not None}} if isinstance(v, dict) else "
    "[w for x in v if (w := p(x)) is not None] if isinstance(v, (list, tuple)) else "
    "v if torch.is_tensor(v) or type(v) in (bool, int, float, str) else "
    "torch.as_tensor(v) if getattr(getattr(v, 'dtype', None), 'kind', 'O') in 'biuf' else "
    "p(v.tolist()) if hasattr(v, 'tolist') else None; torch.save(p({load}), '{out}')\""
)
# entries that may hold objects beside the weights
DATA_ENTRIES = (
    "test_dataset", "train_dataset", "last_epoch_imgs", "last_epoch_labels", "last_train_aug_data",
    "last_train_aug_label",
)  # fmt: skip


class Unread:
    """Stands for an object of a file whose class is not known here; takes whatever the file gives it and keeps none."""

    def __new__(cls, *_args: Any, **_fields: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_fields: Any):
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def read(path: Path, say: Callable[[str], None] = lambda text: None, key: str = CHECKPOINT) -> Any:
    """Read a torch file without running code: tensors, plain values, numpy arrays, settings.

    Args:
        path: the file.
        say: called with a line if entries were left out because they hold objects.
        key: the recipe key that names the file, for messages; "" if none does.

    Raises:
        PruneError: the file is damaged, many times its size when read, a program (TorchScript), or holds objects
            outside of ``DATA_ENTRIES``.
    """
    where = f"{key}: {path}" if key else str(path)
    _check_size(path, where)
    _refuse_torchscript(path, where)
    try:
        if _is_pickle(path):
            raise pickle.UnpicklingError("no file of torch")
        return _load(path)
    except pickle.UnpicklingError as error:
        kept = _without_data_sets(path, say)
        if kept is not None:
            return kept
        raise _refusal(path, where, error) from error
    except Exception as error:  # a damaged file raises errors of many classes
        raise PruneError(f"{where} is no torch checkpoint, or is cut short: {error!r}") from error


def _refusal(path: Path, where: str, error: Exception) -> PruneError:
    """The error for a file that only unpickling could read, with the command that converts it, or for another file."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(NUMPY):
        return PruneError(f"{where} is a file of numpy, not of torch; torch.save its arrays, or name another file")
    if not zipfile.is_zipfile(path) and not head.startswith(PICKLE):
        return PruneError(f"{where} is no torch checkpoint: it begins with {shown(head[:12])}")
    named = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
    globals_text = f" ({', '.join(named)})" if named else ""
    load = f"torch.load({path.name!r}, map_location='cpu', weights_only=False)"
    load = f"pickle.load(open({path.name!r}, 'rb'))" if _is_pickle(path) else load
    return PruneError(
        f"{where} holds more than tensors{globals_text}; reading it would run code, so it is refused. If you trust it, "
        "convert it where its program runs, and give the new file:\n  "
        + CONVERT.format(load=load, out=f"{path.stem}.plain.pth")
    )


def _is_pickle(path: Path) -> bool:
    """Whether a file was written by pickle and not by torch, which reads no such file."""
    with path.open("rb") as file:
        head = file.read(64)
    return head.startswith(PICKLE) and OLD_TORCH not in head and not zipfile.is_zipfile(path)


def _load(path: Path, more: list[Any] | None = None) -> Any:
    with torch.serialization.safe_globals([*_numpy_globals(), *SETTINGS_CLASSES, *(more or [])]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _without_data_sets(path: Path, say: Callable[[str], None]) -> dict[Any, Any] | None:
    """The entries of a checkpoint without those that hold data sets; None if it is another kind of file.

    Weights-only loading sees ``Unread`` under the name of every class of the file. It refuses names that could do
    something (of ``os``, ``sys``, ...) whatever stands for them.
    """
    try:
        with torch.serialization.safe_globals([*_numpy_globals(), *SETTINGS_CLASSES]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        body = _load(path, [(Unread, name) for name in names])
    except Exception:  # a damaged or older file, or one that does more than make objects: the first error says so
        return None
    if not isinstance(body, Mapping):
        return None
    unread = [key for key, value in body.items() if _holds_objects(value)]
    if not unread or not all(key in DATA_ENTRIES for key in unread):
        return None
    say(f"checkpoint: left out of {path.name}, data sets as objects of a program: {', '.join(map(str, unread))}")
    return {key: value for key, value in body.items() if key not in unread}


def _holds_objects(value: Any, depth: int = 0) -> bool:
    """Whether a value is an object of an unknown class, or holds one; very deep values count as such."""
    if isinstance(value, Unread) or depth > 20:
        return True
    if isinstance(value, type):
        return issubclass(value, Unread)
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return any(_holds_objects(part, depth + 1) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple | set) and any(_holds_objects(part, depth + 1) for part in value)


def _check_size(path: Path, where: str) -> None:
    """Raise PruneError for an archive that is much larger when unpacked; torch writes archives uncompressed."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise PruneError(f"{where} is no torch checkpoint, or is cut short: {error!r}") from error
    if total > max(4 * path.stat().st_size, SMALL_FILE):
        raise PruneError(f"{where} would become {total:,} bytes, many times its size")


def _refuse_torchscript(path: Path, where: str) -> None:
    """Raise PruneError for an archive of ``torch.jit.save``, which has its program beside the weights."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}  # the first folder has the archive's name
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        raise PruneError(
            f"{where} is a TorchScript program (torch.jit.save), not a file of weights. Save its "
            "state_dict, and name the new file:\n"
            f"  python -c \"import torch; from safetensors.torch import save_file; m = torch.jit.load('{path.name}', "
            "map_location='cpu'); save_file({k: v.clone().contiguous() for k, v in m.state_dict().items()}, "
            "'weights.safetensors')\"\n"
            "torch.save(m.state_dict(), 'weights.pth') makes a file that is read as well"
        )


def _numpy_globals() -> list[Any]:
    """The few numpy names that arrays and scalars in old checkpoints need; none of them runs code of the file."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    rebuild, scalar = multiarray._reconstruct, multiarray.scalar
    old = [(rebuild, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar")]
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]
    return [rebuild, scalar, np.ndarray, np.dtype, *old, *kinds]
