"""Weights and training states on disk: safetensors, written atomically, read without unpickling."""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.ledger import canonical, write_atomic

WRAPPERS = ("state_dict", "model", "model_state", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")


def encode(tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> bytes:
    """Named tensors and a JSON-ready ``meta`` as the bytes of a safetensors file."""
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"meta": json.dumps(dict(meta or {}), sort_keys=True)})


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Write named tensors and a JSON-ready ``meta`` as one safetensors file, atomically."""
    write_atomic(path, encode(tensors, meta))


def save_sealed(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """``save`` for what has no proof beside it: a digest of tensors and meta goes into the meta."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save(path, plain, {**meta, "seal": _seal(plain, meta)})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_sealed`` wrote; PruneError where a bit of it is another."""
    tensors, meta = read(path)
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


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta of a safetensors file; PruneError where it is damaged, or no file."""
    try:
        if not path.is_file():  # a FIFO would be waited for, a folder be no SafetensorError
            raise OSError("it is no file" if os.path.lexists(path) else "it is not there")
        with safetensors.safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            if not isinstance(meta, dict):
                raise ValueError("its meta is no mapping")
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, TypeError, RecursionError) as error:
        raise PruneError(f"{path} cannot be read as safetensors ({error}); it is damaged or cut short") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A user's checkpoint: .safetensors, or a torch file that holds tensors and nothing that needs code.

    Known wrappings are undone: a ``state_dict`` or ``model`` key around the weights, ``module.`` before the names.

    Raises:
        PruneError: no such file, damaged, or loading it would run code.
    """
    if not path.is_file():
        raise PruneError(f"backbone.checkpoint: there is no file {path}. Leave the key out to train the dense network.")
    state: Any = read(path)[0] if path.suffix == ".safetensors" else _torch_file(path)
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise PruneError(f"backbone.checkpoint: {path} holds no state dict (names and tensors)")
    return {_bare(name): tensor for name, tensor in state.items()}


def _torch_file(path: Path) -> Any:
    """What a torch file holds, read without running code: tensors, plain values and numpy arrays."""
    try:
        with torch.serialization.safe_globals(_arrays()):
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


def _arrays() -> list[Any]:
    """The few numpy names that arrays and scalars in old checkpoints need; none of them runs what a file says."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    rebuild, scalar = multiarray._reconstruct, multiarray.scalar
    old = [(rebuild, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar")]
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]
    return [rebuild, scalar, np.ndarray, np.dtype, *old, *kinds]


def fit(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load ``weights`` strictly; PruneError says which names or shapes do not fit."""
    wanted = model.state_dict()
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the network"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in wanted]
    if wrong or missing or extra:
        lines = []
        for title, found in (("wrong shape", wrong), ("missing in the file", missing), ("not in the network", extra)):
            if found:
                more = f" and {len(found) - 4} more" if len(found) > 4 else ""
                lines.append(f"  - {title}: {'; '.join(found[:4])}{more}")
        raise PruneError(f"backbone.checkpoint: {source} does not fit the network\n" + "\n".join(lines))
    strange = [
        name for name, tensor in weights.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if strange:
        raise PruneError(f"backbone.checkpoint: {source} holds values that are not finite, in {', '.join(strange[:4])}")
    model.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Give an optimizer the state that ``pack`` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**plain["state"], **tensors}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
