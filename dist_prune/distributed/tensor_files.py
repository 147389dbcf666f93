"""Tensors on disk: safetensors written atomically, checkpoints of users read without unpickling, optimizer states."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dist_prune.distributed import checkpoint_formats, torch_files
from dist_prune.errors import PruneError, abbreviate, shown
from dist_prune.fileio import canonical, write_atomic

TORCH = (b"PK\x03\x04", b"\x80\x02")  # first bytes of torch's files: a zip archive, or (before 1.6) a pickle


def encode(tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> bytes:
    """Encode named tensors as the bytes of a safetensors file.

    Args:
        tensors: name -> tensor of any shape and dtype, on any device.
        meta: JSON values by key, stored in the file's metadata.
    """
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"meta": json.dumps(dict(meta or {}), sort_keys=True)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Write named tensors as one safetensors file, atomically.

    Args:
        path: the file; an existing one is replaced.
        tensors: name -> tensor of any shape and dtype, on any device.
        meta: JSON values by key, stored in the file's metadata.

    Raises:
        PruneError: the disk refuses.
    """
    write_atomic(path, encode(tensors, meta))


def save_sealed(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a file as ``save_tensors`` does, with a digest of tensors and meta in the meta; ``read_sealed`` checks it.

    Args:
        path: the file; an existing one is replaced.
        tensors: name -> tensor of any shape and dtype, on any device.
        meta: JSON values by key.

    Raises:
        PruneError: the disk refuses.
    """
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_tensors(path, plain, {**meta, "seal": _seal(plain, meta)})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of ``save_sealed``.

    Returns:
        Name -> tensor, on the CPU, and the meta with its digest under ``seal``.

    Raises:
        PruneError: the file is missing, cut short, or differs by a single bit.
    """
    tensors, meta = read_tensors(path)
    if meta.get("seal") != _seal(tensors, {key: value for key, value in meta.items() if key != "seal"}):
        raise PruneError(f"{path} is damaged: its digest is not that of its content")
    return tensors, meta


def _seal(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    hasher = hashlib.sha256(canonical(dict(meta)).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file of ``save_tensors``.

    Returns:
        Name -> tensor, on the CPU, and the meta ({} if the file has none).

    Raises:
        PruneError: the path is no file, or the file is damaged or cut short.
    """
    try:
        if not path.is_file():  # a FIFO would block, and a folder raises another error
            raise OSError("it is no file" if os.path.lexists(path) else "it is not there")
        with safetensors.safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # a damaged header raises errors of many classes
        reason = shown(str(error) or repr(error))[1:-1]
        raise PruneError(f"{path} cannot be read as safetensors ({reason}); it is damaged or cut short") from error
    if not isinstance(meta, dict):
        raise PruneError(f"{path} is damaged: its metadata is {shown(meta)}, no mapping")
    return tensors, meta


def read_weights(
    path: Path,
    key: str = checkpoint_formats.AUTO,
    skip: Iterable[str] = (),
    wanted: Iterable[str] | None = None,
    say: checkpoint_formats.Say = lambda text: None,
) -> dict[str, Tensor]:
    """Read a user's checkpoint: safetensors, or a torch file that holds tensors and nothing that needs code.

    The file's content decides its format, not its suffix. The state dict is taken out of the entries around it,
    prefixes of its names are removed, counters and losses are left out (see checkpoint_formats.py).

    Args:
        path: the file.
        key: the recipe's ``backbone.checkpoint_key``: the entry that is taken.
        skip: the recipe's ``backbone.checkpoint_skip``: globs of names that are left out.
        wanted: names of the network's state; None if the network is unknown.
        say: called with a line for each choice and each omission.

    Returns:
        Name -> tensor, on the CPU, under the network's names.

    Raises:
        PruneError: there is no such file, it is damaged, loading it would run code, or it has no such entry or name.
    """
    if not path.is_file():
        raise PruneError(f"backbone.checkpoint: there is no file {path}. Leave the key out to train the dense network.")
    state: Any = read_tensors(path)[0] if _holds_safetensors(path) else torch_files.read(path, say)
    state_dict = checkpoint_formats.unwrap_state_dict(state, key, path.name, say)
    _check_plain(state_dict, path)
    return checkpoint_formats.match_names(state_dict, wanted, skip, path.name, say)


def _holds_safetensors(path: Path) -> bool:
    """Whether a file is safetensors: by its first bytes (a header's length below 4 GB, a brace), else by its suffix."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[4:] == bytes(4) + b"{":
        return True
    return path.suffix == ".safetensors" and not head.startswith(TORCH)


def _check_plain(state: Mapping[Any, Tensor], path: Path) -> None:
    """Raise PruneError for a tensor that is not plain or has no name, and for tensors much larger than their file."""
    total = 0
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
        total += tensor.nbytes
    limit = max(4 * path.stat().st_size, torch_files.SMALL_FILE)
    if total > limit:
        raise PruneError(
            f"backbone.checkpoint: {path} has {path.stat().st_size:,} bytes, and its tensors would have {total:,}: "
            "they were expanded. Save contiguous copies"
        )


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], source: str, new: Iterable[str] = ()) -> None:
    """Load weights into a network, in place; names and shapes have to match.

    Args:
        model: the network.
        weights: name -> tensor. ``num_batches_tracked`` may be missing.
        source: name of the file, for messages.
        new: names of the network's state that keep their present values (a new head).

    Raises:
        PruneError: names or shapes do not match (it lists them), or values are not finite.
    """
    wanted, new = model.state_dict(), set(new)
    weights = {name: tensor for name, tensor in weights.items() if name not in new}
    wrong_shape = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the network"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    missing = [name for name in wanted if name not in {*weights, *new} and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in wanted]
    if wrong_shape or missing or extra:
        lines = []
        for title, problems in (
            ("wrong shape", wrong_shape),
            ("missing in the file", missing),
            ("not in the network", extra),
        ):
            if problems:
                lines.append(f"  - {title}: {abbreviate(problems, 4, '; ')}")
        raise PruneError(f"backbone.checkpoint: {source} does not fit the network\n" + "\n".join(lines))
    not_finite = [
        name for name, tensor in weights.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if not_finite:
        raise PruneError(
            f"backbone.checkpoint: {source} holds values that are not finite, in {', '.join(not_finite[:4])}"
        )
    model.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors and plain values.

    Returns:
        ``<number of the parameter>.<key>`` -> tensor, and {"state": the other values by the same names, "groups": the
        parameter groups}, JSON values.
    """
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{key}"] = value
    # timm's lamb counts its steps in a tensor of the group, and accepts a plain number for it
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"state": plain, "groups": groups}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Load a state of ``pack_optimizer`` into an optimizer.

    Args:
        optimizer: has the same parameters in the same groups and order.
        tensors: ``<number of the parameter>.<key>`` -> tensor.
        plain: the plain values that ``pack_optimizer`` returned.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**plain["state"], **tensors}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
