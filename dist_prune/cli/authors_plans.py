"""Files in which the papers' programs keep what they prune, read as plans and written from runs.

``sensitivity``: ``channel_index.pth``, the 0/1 masks of a block's layers. ``mint``: ``I_parent_*`` (child groups,
parent groups) of each pair of layers. ``entropy``: ``filter_delete_order_*`` lists in a checkpoint. ``graph``: pruning
information as JSON. Nothing is unpickled: torch files are read weights-only, numpy files with ``allow_pickle=False``.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.distributed import torch_files
from dist_prune.errors import PruneError, abbreviate, nearest, shown
from dist_prune.methods.base import Method
from dist_prune.methods.entropy.options import SAMPLINGS
from dist_prune.methods.mint.method import Mint
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.plan.plan import Plan

ORDER = "filter_delete_order_"
WIDTHS_FILE = (
    "{file} holds widths, not which filters stay (the authors' channel_dim.pth). Give the masks, channel_index.pth of "
    "each block in order, or let a method choose the filters: {counts}"
)


def read_masks(files: Sequence[Path], graph: DependencyGraph) -> Plan:
    """Make the plan of the Sensitivity Pruner's masks.

    Args:
        files: ``channel_index.pth`` of each block, in the order of the blocks: a list of vectors, or of such lists, 1
            where a filter stays. An entry of exactly 0.5 counts as kept, as in the program.
        graph: its free groups are the masked layers, in order.

    Raises:
        PruneError: a file holds anything else, or numbers or widths differ from those of the network.
    """
    groups = graph.free
    masks = [mask for file in files for mask in _vectors(file, groups)]
    if len(masks) != len(groups):
        raise PruneError(
            f"the files hold {len(masks)} masks, and the network has {len(groups)} groups that the recipe prunes, from "
            f"{groups[0].name!r} to {groups[-1].name!r}: give the files of all blocks in order, or name the layers "
            "with select.include"
        )
    kept = {}
    for number, (group, mask) in enumerate(zip(groups, masks, strict=True), start=1):
        if len(mask) != group.width:
            raise PruneError(f"mask {number} is for {len(mask)} filters, and {group.name!r} has {group.width}")
        kept[group.name] = torch.nonzero(mask >= 0.5).flatten().tolist()
        if not kept[group.name]:
            raise PruneError(f"mask {number}, of {group.name!r}, keeps no filter; such a network cannot compute")
    return Plan.from_kept(graph, kept, dict.fromkeys(kept, "its mask keeps all of it"))


def _vectors(file: Path, groups: Sequence[ChannelGroup]) -> list[Tensor]:
    body = torch_files.read(file, key="")
    values = list(body.values()) if isinstance(body, Mapping) else body
    if isinstance(values, Tensor | np.ndarray):  # one mask, or the widths of all layers
        values = values.tolist() if values.ndim == 1 and bool((values > 1).any()) else [values]
    plain = isinstance(values, list | tuple) and bool(values)
    if plain and all(_is_number(v) or (isinstance(v, list) and len(v) < 8 and all(map(_is_number, v))) for v in values):
        raise PruneError(WIDTHS_FILE.format(file=file, counts=_as_counts(values, groups)))
    if not plain or not all(isinstance(v, Tensor | np.ndarray | list) for v in values):
        raise PruneError(f"{file} holds no masks, which are a list of vectors: it is {shown(type(body).__name__)}")
    try:
        masks = [torch.as_tensor(value, dtype=torch.float64) for value in _flatten(values)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise PruneError(f"{file}: a mask is no vector of numbers: {shown(str(error))}") from error
    wrong = next((mask for mask in masks if mask.ndim != 1 or not bool(((mask >= 0) & (mask <= 1)).all())), None)
    if wrong is not None:
        raise PruneError(f"{file}: a mask is one vector of 0 and 1 for each layer, not {shown(wrong.tolist())}")
    return masks


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def _flatten(values: Any, depth: int = 0) -> list[Any]:
    """The vectors of a list, also if they are in a list for each block."""
    nested = isinstance(values, list | tuple) and len(values) > 0 and not any(map(_is_number, values))
    return [part for value in values for part in _flatten(value, depth + 1)] if nested and depth < 4 else [values]


def _as_counts(values: Sequence[Any], groups: Sequence[ChannelGroup]) -> str:
    """Widths as the recipe's ``select.counts``; if they do not fit the groups in order, how they differ."""
    widths = [w for value in values for w in (value if isinstance(value, list) else [value])]
    if len(widths) != len(groups):
        return (
            f"write the widths as select.counts; the file has {len(widths)}, and the network has {len(groups)} groups "
            f"that the recipe prunes, from {groups[0].name!r} to {groups[-1].name!r}"
        )
    wrong = next(((g, w) for g, w in zip(groups, widths, strict=True) if w != int(w) or not 1 <= w <= g.width), None)
    if wrong is not None:
        return f"select.counts; but {shown(wrong[1])} is no width of {wrong[0].name!r}, which has {wrong[0].width}"
    counts = ", ".join(f"{group.name}: {int(width)}" for group, width in zip(groups, widths, strict=True))
    return f"select.counts='{{{counts}}}'"


def read_orders(
    files: Sequence[Path],
    graph: DependencyGraph,
    sampling: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Tensor]:
    """Read the entropy authors' orders of deletion: the scores ``<group>:order`` of the method entropy.

    Layers are matched by the end of an entry's name; numbered layers of other names (``conv1``, ``conv2``, ..) by
    their numbers if as many groups are left and the widths agree.

    Args:
        files: checkpoints or order files with ``filter_delete_order_[<sampling>_[skipZero_]]<layer>`` lists.
        graph: its free groups need an order each.
        sampling: the program's name of the orders to take, if files hold several; None: all.
        say: called with a line that shows the layers that were matched by their numbers.

    Raises:
        PruneError: an order is missing, given twice, or no permutation of its layer's filters.
    """
    entries = [(file, key, order) for file in files for key, order in _orders(file)]
    if sampling and any(_sampling_of(key) for _, key, _ in entries):
        entries = [entry for entry in entries if _sampling_of(entry[1]) in (sampling, None)]
    seen = [key for _, key, _ in entries]
    scores: dict[str, Tensor] = {}
    others: list[tuple[Path, str, Any]] = []
    for file, key, order in entries:
        name = next((g.name for g in graph.free if key.endswith(f"_{g.name}")), None)
        if name is None:
            others.append((file, key, order))
            continue
        if f"{name}:order" in scores:
            raise PruneError(
                f"{file}: {key!r} is a second order of {name!r}; give a file with one of them, or name the program's "
                "sampling with method.sampling"
            )
        scores[f"{name}:order"] = _permutation(order, graph.group(name).width, f"{file}: {key}")
    missing = [group for group in graph.free if f"{group.name}:order" not in scores]
    if missing and _are_numbered(others, missing):
        by_number = sorted(others, key=lambda entry: _number_of(entry[1])[1])
        shown_pairs = [f"{key} -> {group.name}" for (_, key, _), group in zip(by_number, missing, strict=True)]
        say(f"orders: {len(missing)} layers were matched by their numbers: {', '.join(shown_pairs)}")
        for (file, key, order), group in zip(by_number, missing, strict=True):
            scores[f"{group.name}:order"] = _permutation(order, group.width, f"{file}: {key}")
    elif missing:
        names = [group.name for group in missing]
        raise PruneError(
            f"no order of {abbreviate(names)}: the files have {abbreviate(seen) or 'none'}. Leave layers out with "
            f"select.exclude{nearest(ORDER + names[0], seen)}"
        )
    return scores


def _orders(file: Path) -> list[tuple[str, Any]]:
    body = torch_files.read(file, key="")
    if not isinstance(body, Mapping):
        raise PruneError(f"{file} holds no orders, which are lists under names {ORDER}<layer>")
    return [(key, order) for key, order in body.items() if isinstance(key, str) and key.startswith(ORDER)]


def _sampling_of(key: str) -> str | None:
    """The program's sampling in an entry's name: the longest that fits; None for the older names without one."""
    found = [name for name in SAMPLINGS if key.startswith(f"{ORDER}{name}_")]
    return max(found, key=len, default=None)


def _number_of(key: str) -> tuple[str, int]:
    """An entry's name without the number at its end, and the number; -1 if it has none."""
    match = re.fullmatch(r"(.*?)(\d+)", key)
    return (match[1], int(match[2])) if match else (key, -1)


def _are_numbered(entries: Sequence[tuple[Path, str, Any]], groups: Sequence[ChannelGroup]) -> bool:
    """Whether entries are the numbered layers of one name, as many as groups and as wide, in the order of numbers."""
    numbers = [_number_of(key) for _, key, _ in entries]
    if len(entries) != len(groups) or len({stem for stem, _ in numbers}) != 1:
        return False
    in_order = sorted(zip([number for _, number in numbers], entries, strict=True), key=lambda pair: pair[0])
    distinct = len({number for _, number in numbers}) == len(numbers) and in_order[0][0] >= 0
    widths = [len(order) if hasattr(order, "__len__") else -1 for _, (_, _, order) in in_order]
    return distinct and widths == [group.width for group in groups]


def _permutation(order: Any, width: int, where: str) -> Tensor:
    values = order.tolist() if isinstance(order, Tensor | np.ndarray) else order
    whole = isinstance(values, list | tuple) and all(isinstance(v, int | np.integer) for v in values)
    if not whole or sorted(map(int, values)) != list(range(width)):
        raise PruneError(f"{where} is no order of {width} filters, each once: {shown(values)}")
    return torch.tensor([int(v) for v in values])


def read_scores(files: Sequence[Path], graph: DependencyGraph, method: Method) -> dict[str, Tensor]:
    """Read MINT's scores of blocks: the scores of the method mint, in the files' order of values.

    Thresholds depend only on which scores are larger, so each distinct score I becomes a whole number that rises as I
    falls, as the cross edges R do.

    Args:
        files: ``I_parent_*`` as ``.npz`` (entries "0", "1", ..) or as one ``.npy`` a pair, in the order of the pairs;
            ``Labels_*`` and ``Labels_children_*`` are checked to be runs of neighbouring channels.
        graph: of the dense network.
        method: the recipe's method mint; its pairs and numbers of groups have to be the files'.

    Raises:
        PruneError: a file needs unpickling, or its tables are not those of the method's pairs.
    """
    if not isinstance(method, Mint):
        raise PruneError("method.name: a plan of MINT's scores needs method.name=mint (method.p sets how much is cut)")
    tables = [t for file in files if not file.name.startswith("Labels") for t in _arrays(file)]
    pairs = method.pairs(graph)
    if len(tables) != len(pairs):
        raise PruneError(
            f"the files hold {len(tables)} tables of scores, and the recipe scores {len(pairs)} pairs of layers: "
            f"{abbreviate([pair.child for pair in pairs])}. method.skip leaves layers out"
        )
    for pair, table in zip(pairs, tables, strict=True):
        if table.dtype.kind not in "biuf" or not np.isfinite(table).all():
            raise PruneError(
                f"{pair.child}: its table holds values that are no finite numbers: {shown(table.tolist())}"
            )
        if table.shape != (len(pair.rows), len(pair.columns)):
            raise PruneError(
                f"{pair.child}: a table of {table.shape}, and the recipe has {len(pair.rows)} child groups and "
                f"{len(pair.columns)} parent groups (method.groups, method.child_groups, method.parent_groups)"
            )
    for file in files:
        if file.name.startswith("Labels"):
            _check_labels(file)
    distinct = np.unique(np.concatenate([table.ravel() for table in tables]))
    scores: dict[str, Tensor] = {}
    for pair, table in zip(pairs, tables, strict=True):
        ranks = len(distinct) - np.searchsorted(distinct, table)
        scores[f"{pair.child}:edges"] = torch.from_numpy(ranks.astype(np.int64))
        scores[f"{pair.child}:sizes"] = torch.tensor([len(distinct) + 1] * 2)
    return scores


def _check_labels(file: Path) -> None:
    for labels in _arrays(file):
        numbers = labels.ndim == 1 and len(labels) > 0 and labels.dtype.kind in "biuf"
        if not numbers or not (np.diff(labels) >= 0).all() or len(set(np.unique(labels, return_counts=True)[1])) != 1:
            raise PruneError(
                f"{file}: groups are no equal runs of neighbouring channels, which mint here needs: "
                f"{shown(labels.tolist())}"
            )


def _arrays(file: Path) -> list[np.ndarray]:
    """The arrays of an .npz (by their numbers) or .npy file, without unpickling."""
    try:
        body = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
        if isinstance(body, np.ndarray):
            return [body]
        return [body[key] for key in sorted(body.files, key=lambda key: (len(key), key))]
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise PruneError(f"{file} is no file of numpy: {shown(str(error))}") from error
        raise PruneError(
            f"{file} holds Python objects, which only unpickling could read, so it is refused. If you trust it, "
            "convert it where its program runs, and give the new file:\n"
            f'  python -c "import numpy as np; d = np.load({file.name!r}, allow_pickle=True); '
            f"d = dict(enumerate(d)) if d.ndim else d.item(); d = d if isinstance(d, dict) else dict(enumerate(d)); "
            f"np.savez('{file.stem}.npz', **{{str(k): v for k, v in d.items()}})\""
        ) from error
    except Exception as error:  # a damaged archive raises errors of many classes
        raise PruneError(f"{file} cannot be read as a file of numpy: {shown(str(error))}") from error
