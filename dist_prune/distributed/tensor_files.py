"""Weights and training states on disk: safetensors, written atomically, read without unpickling."""

import argparse
import hashlib
import json
import os
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dist_prune.distributed import checkpoint_formats
from dist_prune.errors import PruneError, abbreviate, shown
from dist_prune.fileio import canonical, write_atomic

TORCH = (b"PK\x03\x04", b"\x80\x02")  # what torch's files begin with: a zip archive, or (before 1.6) a pickle
# what training programs keep their settings in; making one fills its fields and runs nothing
BAGS = [argparse.Namespace, types.SimpleNamespace, pathlib.PurePosixPath, pathlib.PosixPath]
SMALL_FILE = 64_000_000  # bytes that the tensors of however small a file may take


def encode(tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> bytes:
    """Named tensors and a JSON-ready ``meta`` as the bytes of a safetensors file."""
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"meta": json.dumps(dict(meta or {}), sort_keys=True)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Write named tensors and a JSON-ready ``meta`` as one safetensors file, atomically."""
    write_atomic(path, encode(tensors, meta))


def save_sealed(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """``save`` for what has no proof beside it: a digest of tensors and meta goes into the meta."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_tensors(path, plain, {**meta, "seal": _seal(plain, meta)})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_sealed`` wrote; PruneError where a bit of it is another."""
    tensors, meta = read_tensors(path)
    if meta.get("seal") != _seal(tensors, {key: value for key, value in meta.items() if key != "seal"}):
        raise PruneError(f"{path} is damaged: its digest is not that of its content")
    return tensors, meta


def _seal(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    found = hashlib.sha256(canonical(dict(meta)).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta of a safetensors file; PruneError where it is damaged, or no file."""
    try:
        if not path.is_file():  # a FIFO would be waited for, a folder be no SafetensorError
            raise OSError("it is no file" if os.path.lexists(path) else "it is not there")
        with safetensors.safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # whatever a damaged header makes the reader stumble over
        said = shown(str(error) or repr(error))[1:-1]
        raise PruneError(f"{path} cannot be read as safetensors ({said}); it is damaged or cut short") from error
    if not isinstance(meta, dict):
        raise PruneError(f"{path} is damaged: beside its tensors it holds {shown(meta)}, no mapping")
    return found, meta


def read_weights(
    path: Path,
    key: str = checkpoint_formats.AUTO,
    skip: Iterable[str] = (),
    wanted: Iterable[str] | None = None,
    say: checkpoint_formats.Say = lambda text: None,
) -> dict[str, Tensor]:
    """A user's checkpoint: safetensors, or a torch file that holds tensors and nothing that needs code.

    What the file is, its content says and not its suffix. Entries around the state dict and prefixes before its names
    are undone, counters and losses left out (``wrappings``).

    Args:
        key: the recipe's ``backbone.checkpoint_key``.
        skip: its ``backbone.checkpoint_skip``.
        wanted: names of the network's state, where it is known.
        say: takes a line for what was chosen or left out.

    Raises:
        PruneError: no such file, damaged, loading it would run code, or no entry or name as asked for.
    """
    if not path.is_file():
        raise PruneError(f"backbone.checkpoint: there is no file {path}. Leave the key out to train the dense network.")
    state: Any = read_tensors(path)[0] if _holds_safetensors(path) else _torch_file(path)
    found = checkpoint_formats.unwrap_state_dict(state, key, path.name, say)
    _solid(found, path)
    return checkpoint_formats.match_names(found, wanted, skip, path.name, say)


def _holds_safetensors(path: Path) -> bool:
    """By its first bytes, a JSON header's length (below 4 GB) and brace; by its suffix where they are neither's."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[4:] == bytes(4) + b"{":
        return True
    return path.suffix == ".safetensors" and not head.startswith(TORCH)


def _solid(state: Mapping[Any, Tensor], path: Path) -> None:
    """PruneError for what is no plain tensor with a name, or says it is larger than the file that it came from."""
    whole = 0
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise PruneError(
                f"backbone.checkpoint: {path} holds {shown(name)} for the name of a tensor; names are texts"
            )
        kind = (
            "on the meta device, without values" if tensor.is_meta
            else "quantized" if tensor.is_quantized
            else str(tensor.layout) if tensor.layout is not torch.strided
            else "nested" if tensor.is_nested else ""
        )  # fmt: skip
        if kind:
            raise PruneError(f"backbone.checkpoint: {path}: {shown(name)} is {kind}; save plain, dense tensors")
        whole += tensor.nbytes
    room = max(4 * path.stat().st_size, SMALL_FILE)
    if whole > room:
        raise PruneError(
            f"backbone.checkpoint: {path} has {path.stat().st_size:,} bytes, and its tensors would have {whole:,}: "
            "they were expanded. Save contiguous copies"
        )


def _torch_file(path: Path) -> Any:
    """What a torch file holds, read without running code: tensors, plain values, numpy arrays, settings in bags."""
    _unpacked(path)
    try:
        with torch.serialization.safe_globals([*_arrays(), *BAGS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        what = f" ({', '.join(named)})" if named else ""
        raise PruneError(
            f"backbone.checkpoint: {path} holds more than tensors{what}; reading it would run code, so it is refused. "
            "Where you trust it, save its state_dict as safetensors."
        ) from error
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        raise PruneError(f"backbone.checkpoint: {path} is no torch checkpoint, or is cut short: {error!r}") from error


def _unpacked(path: Path) -> None:
    """PruneError for an archive that would become many times its size; torch writes them uncompressed."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            whole = sum(member.file_size for member in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise PruneError(f"backbone.checkpoint: {path} is no torch checkpoint, or is cut short: {error!r}") from error
    if whole > max(4 * path.stat().st_size, SMALL_FILE):
        raise PruneError(f"backbone.checkpoint: {path} would become {whole:,} bytes, many times its size")


def _arrays() -> list[Any]:
    """The few numpy names that arrays and scalars in old checkpoints need; none of them runs what a file says."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    rebuild, scalar = multiarray._reconstruct, multiarray.scalar
    old = [(rebuild, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar")]
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]
    return [rebuild, scalar, np.ndarray, np.dtype, *old, *kinds]


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], source: str, new: Iterable[str] = ()) -> None:
    """Load ``weights`` strictly, all but ``new`` names; PruneError says which names or shapes do not fit."""
    wanted, new = model.state_dict(), set(new)
    weights = {name: tensor for name, tensor in weights.items() if name not in new}
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the network"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    missing = [name for name in wanted if name not in {*weights, *new} and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in wanted]
    if wrong or missing or extra:
        lines = []
        for title, found in (("wrong shape", wrong), ("missing in the file", missing), ("not in the network", extra)):
            if found:
                lines.append(f"  - {title}: {abbreviate(found, 4, '; ')}")
        raise PruneError(f"backbone.checkpoint: {source} does not fit the network\n" + "\n".join(lines))
    strange = [
        name for name, tensor in weights.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if strange:
        raise PruneError(f"backbone.checkpoint: {source} holds values that are not finite, in {', '.join(strange[:4])}")
    model.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and plain values."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{key}"] = value
    # timm's lamb counts its steps in a tensor of the group, and takes a plain number back
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"state": plain, "groups": groups}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Give an optimizer the state that ``pack`` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**plain["state"], **tensors}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
