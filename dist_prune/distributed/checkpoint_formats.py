"""State dicts of other programs' checkpoints: wrapping entries, prefixes of names, foreign tensors.

This module opens no files; ``tensor_files.read_weights`` does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from dist_prune.errors import PruneError, abbreviate, nearest

AUTO = "auto"
# entries of averaged weights and of plain ones; timm's loader knows the first two of each
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLAIN = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params")
ORDER = (*AVERAGED[:2], *PLAIN, *AVERAGED[2:])  # timm's loader prefers averaged weights
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
# entries of averaged models, of thop and of a saved loss, which no network computes with
FOREIGN = ("n_averaged", "total_ops", "*.total_ops", "total_params", "*.total_params", "criterion.*")
LEVELS = 4  # of wrappers within wrappers

Say = Callable[[str], None]


def unwrap_state_dict(state: Any, key: str, source: str, say: Say = lambda text: None) -> dict[str, Tensor]:
    """Find the state dict in the content of a checkpoint.

    Args:
        state: content of the file.
        key: ``auto`` (the entry that timm's loader takes: averaged weights before plain ones), ``ema`` (averaged ones
            under any of their names), or the name of an entry.
        source: name of the file, for messages.
        say: called with a line if there were several entries to choose from, and if values that are no tensors were
            left out.

    Returns:
        Name -> tensor, without values that are no tensors. Names may be no strings (the caller checks them).

    Raises:
        PruneError: no entry of that name, or no entry that holds tensors.
    """
    if not isinstance(state, Mapping) or not state:
        raise PruneError(f"backbone.checkpoint: {source} holds no state dict (names and tensors)")
    if key != AUTO:
        state = _entry(state, key, source)
    for _ in range(LEVELS):
        inner = _inner(state)
        name = next((name for name in ORDER if name in inner), None)
        if name is None:
            break
        others = [other for other in inner if other != name and other in ORDER]
        if others:
            kind = "averaged" if name in AVERAGED else "plain"
            say(
                f"checkpoint: {source} has {', '.join((name, *others))}; the {kind} weights of {name} are taken, as "
                f"timm's loader does. backbone.checkpoint_key={others[0]} takes the others"
            )
        state = inner[name]
    inner = _inner(state)
    tensors = {
        name: value for name, value in state.items() if isinstance(value, Tensor)
    }  # names: see tensor_files._check_plain
    if not tensors or inner:
        entries = "; ".join(f"{name} ({_count(entry)} tensors)" for name, entry in inner.items())
        raise PruneError(
            f"backbone.checkpoint: {source} holds no state dict (names and tensors) under a name that is known"
            + (f"; it has {entries}: name one with backbone.checkpoint_key=" if entries else "")
        )
    if plain := [str(name) for name in state if not isinstance(state[name], Tensor)]:
        say(f"checkpoint: left out of {source}, no tensors: {abbreviate_names(plain)}")
    return tensors


def _entry(state: Mapping[Any, Any], key: str, source: str) -> Any:
    """The entry of that name."""
    inner = _inner(state)
    name = next((name for name in (AVERAGED if key == "ema" else (key,)) if name in inner), None)
    if name is None:
        known = ", ".join(map(str, inner)) or "none: its tensors lie at the top level, which auto takes"
        raise PruneError(
            f"backbone.checkpoint_key: {source} has no entry {key!r} that holds tensors."
            f"{nearest(key, map(str, inner))} It has {known}"
        )
    return inner[name]


def _inner(state: Mapping[Any, Any]) -> dict[Any, Mapping[Any, Any]]:
    """The entries that hold tensors, without an optimizer's state."""
    return {
        name: value for name, value in state.items()
        if isinstance(value, Mapping) and _count(value) and not str(name).startswith(("optim", "lr_sched", "sched"))
    }  # fmt: skip


def _count(state: Mapping[Any, Any], depth: int = 0) -> int:
    """The number of named tensors in an entry and in its entries."""
    return sum(
        1 if isinstance(value, Tensor) and isinstance(name, str)
        else _count(value, depth + 1) if isinstance(value, Mapping) and depth < LEVELS else 0
        for name, value in state.items()
    )  # fmt: skip


def match_names(
    weights: Mapping[str, Tensor],
    wanted: Iterable[str] | None,
    skip: Iterable[str],
    source: str,
    say: Say = lambda text: None,
) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint as the network names them, and leave foreign ones out.

    The stack of prefixes that makes most names match is removed from all of them (without a network: the one that all
    names share). Counters and losses (``FOREIGN``) are left out unless the network has such a name.

    Args:
        weights: name -> tensor, as the file has them.
        wanted: names of the network's state; None if the network is unknown.
        skip: globs of names to leave out (``backbone.checkpoint_skip``), matched with and without prefixes.
        source: name of the file, for messages.
        say: called with a line that lists the names that were left out.

    Returns:
        Name -> tensor, in the file's order; names that the network lacks are kept.

    Raises:
        PruneError: two names become one, or a glob matches no name.
    """
    known, skip = set(wanted or ()), tuple(skip)
    foreign = [name for name in weights if not known and any(fnmatchcase(name, glob) for glob in FOREIGN)]
    stack = _best_stack(weights, known) or _shared_stack(name for name in weights if name not in foreign)
    out: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    left_out: list[str] = []
    used: set[str] = set()
    for name, tensor in weights.items():
        bare = _bare(name, stack, known)
        globs = [glob for glob in skip if fnmatchcase(bare, glob) or fnmatchcase(name, glob)]
        used.update(globs)
        if globs or (bare not in known and any(fnmatchcase(bare, glob) for glob in FOREIGN)):
            left_out.append(bare)
            continue
        if bare in out:
            raise PruneError(
                f"backbone.checkpoint: {source}: without their prefixes {origin[bare]} and {name} are both {bare}; "
                "leave one of them out with backbone.checkpoint_skip=[GLOB]"
            )
        out[bare], origin[bare] = tensor, name
    if unused := [glob for glob in skip if glob not in used]:
        raise PruneError(
            f"backbone.checkpoint_skip: {', '.join(unused)} fit no name in {source}."
            f"{nearest(unused[0].strip('*.'), {name.split('.')[0] for name in out})} "
            f"It has {abbreviate_names(list(out))}"
        )
    if left_out:
        say(f"checkpoint: left out of {source}: {abbreviate_names(left_out)}")
    return out


def abbreviate_names(names: list[str], most: int = 4) -> str:
    """Join names in one line; counters of the same kind are counted.

    Args:
        names: dotted names.
        most: how many are listed; the line ends with the number of further ones.
    """
    ends = Counter(name.rsplit(".", 1)[-1] if name.endswith(("total_ops", "total_params")) else name for name in names)
    parts = [name if count == 1 else f"{count} {name}" for name, count in ends.items()]
    return abbreviate(parts, most)


def _stacks(name: str) -> Iterator[str]:
    """Every stack of prefixes that a name begins with, the empty one first."""
    stack = ""
    while True:
        yield stack
        prefix = next((p for p in PREFIXES if name.startswith(stack + p)), None)
        if prefix is None:
            return
        stack += prefix


def _best_stack(names: Iterable[str], known: set[str]) -> str:
    """The stack whose removal gives the most names of the network; empty if none gives any."""
    matches: Counter[str] = Counter()
    for name in names:
        matches.update(stack for stack in _stacks(name) if _plain(name[len(stack) :]) in known)
    return max(matches, key=lambda stack: (matches[stack], -len(stack)), default="")


def _shared_stack(names: Iterable[str]) -> str:
    """The longest stack that all names begin with."""
    return min((list(_stacks(name))[-1] for name in names), key=len, default="") if (names := list(names)) else ""


def _bare(name: str, stack: str, known: set[str]) -> str:
    """The name without the stack, or without another stack if only that gives a name of the network."""
    first = _plain(name.removeprefix(stack))
    if first in known:
        return first
    return next((bare for s in _stacks(name) if (bare := _plain(name[len(s) :])) in known), first)


def _plain(name: str) -> str:
    """A name without the wrapper of a compiled submodule."""
    return name.replace("._orig_mod.", ".")
