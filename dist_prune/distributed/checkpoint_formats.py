"""Weights as other programs save them: entries around the state dict, prefixes before its names, foreign tensors.

Knows no files; checkpoint.py reads them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from dist_prune.errors import PruneError, abbreviate, nearest

AUTO = "auto"
# where averaged weights lie, and where plain ones do; the first two of each are those that timm's loader knows
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLAIN = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params")
ORDER = (*AVERAGED[:2], *PLAIN, *AVERAGED[2:])  # timm's loader takes averaged weights where there are some
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
# of averaged models, of thop's counting, of a loss that was saved along: nothing that a network computes with
FOREIGN = ("n_averaged", "total_ops", "*.total_ops", "total_params", "*.total_params", "criterion.*")
LEVELS = 4  # wrappers within wrappers

Say = Callable[[str], None]


def unwrap_state_dict(state: Any, key: str, source: str, say: Say = lambda text: None) -> dict[str, Tensor]:
    """The state dict within what a checkpoint holds.

    Args:
        state: what was read.
        key: ``auto`` (the entry that timm's loader takes: averaged weights before plain ones), ``ema`` (averaged ones
            under any of their names), or the name of an entry.
        source: the file, for messages.
        say: told which entry was taken where there were several, and what in it is no tensor.

    Raises:
        PruneError: no entry of that name, or nothing that holds tensors.
    """
    if not isinstance(state, Mapping) or not state:
        raise PruneError(f"backbone.checkpoint: {source} holds no state dict (names and tensors)")
    if key != AUTO:
        state = _asked(state, key, source)
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
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # names: see _solid
    if not tensors or inner:
        held = "; ".join(f"{name} ({_count(part)} tensors)" for name, part in inner.items())
        raise PruneError(
            f"backbone.checkpoint: {source} holds no state dict (names and tensors) under a name that is known"
            + (f"; it has {held}: name one with backbone.checkpoint_key=" if held else "")
        )
    if plain := [str(name) for name in state if not isinstance(state[name], Tensor)]:
        say(f"checkpoint: left out of {source}, no tensors: {abbreviate_names(plain)}")
    return tensors


def _asked(state: Mapping[Any, Any], key: str, source: str) -> Any:
    """The entry of that name."""
    inner = _inner(state)
    found = next((name for name in (AVERAGED if key == "ema" else (key,)) if name in inner), None)
    if found is None:
        known = ", ".join(map(str, inner)) or "none: its tensors stand in it as they are, which auto takes"
        raise PruneError(
            f"backbone.checkpoint_key: {source} has no entry {key!r} that holds tensors."
            f"{nearest(key, map(str, inner))} It has {known}"
        )
    return inner[found]


def _inner(state: Mapping[Any, Any]) -> dict[Any, Mapping[Any, Any]]:
    """The entries that hold weights themselves; an optimizer's state is none."""
    return {
        name: value for name, value in state.items()
        if isinstance(value, Mapping) and _count(value) and not str(name).startswith(("optim", "lr_sched", "sched"))
    }  # fmt: skip


def _count(state: Mapping[Any, Any], depth: int = 0) -> int:
    """Tensors under names, in an entry or in entries of it."""
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
    """Tensors under the names that the network has, without those that no network has.

    The stack of prefixes that makes most names fit is taken off all of them (without a network: the one that all
    names share). Counters and losses (``FOREIGN``) are left out where the network has no such name.

    Args:
        wanted: names of the network's state; None where nobody knows it.
        skip: the recipe's globs of names to leave out, matched with and without prefixes.

    Raises:
        PruneError: two names become one, or a glob fits none.
    """
    known, skip = set(wanted or ()), tuple(skip)
    foreign = [name for name in weights if not known and any(fnmatchcase(name, glob) for glob in FOREIGN)]
    stack = _fitting(weights, known) or _shared(name for name in weights if name not in foreign)
    out: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    left, used = [], set()
    for name, tensor in weights.items():
        bare = _bare(name, stack, known)
        globs = [glob for glob in skip if fnmatchcase(bare, glob) or fnmatchcase(name, glob)]
        used.update(globs)
        if globs or (bare not in known and any(fnmatchcase(bare, glob) for glob in FOREIGN)):
            left.append(bare)
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
    if left:
        say(f"checkpoint: left out of {source}: {abbreviate_names(left)}")
    return out


def abbreviate_names(names: list[str], most: int = 4) -> str:
    """Names in a line: those that end alike are counted."""
    ends = Counter(name.rsplit(".", 1)[-1] if name.endswith(("total_ops", "total_params")) else name for name in names)
    parts = [name if count == 1 else f"{count} {name}" for name, count in ends.items()]
    return abbreviate(parts, most)


def _stacks(name: str) -> Iterator[str]:
    """Every stack of prefixes that may be taken off a name, the empty one first."""
    stack = ""
    while True:
        yield stack
        prefix = next((p for p in PREFIXES if name.startswith(stack + p)), None)
        if prefix is None:
            return
        stack += prefix


def _fitting(names: Iterable[str], known: set[str]) -> str:
    """The stack without which most names are the network's; empty where none are."""
    found: Counter[str] = Counter()
    for name in names:
        found.update(stack for stack in _stacks(name) if _plain(name[len(stack) :]) in known)
    return max(found, key=lambda stack: (found[stack], -len(stack)), default="")


def _shared(names: Iterable[str]) -> str:
    """The longest stack that all names begin with."""
    return min((list(_stacks(name))[-1] for name in names), key=len, default="") if (names := list(names)) else ""


def _bare(name: str, stack: str, known: set[str]) -> str:
    """The name without the stack; one that does not begin with it, or is not known so, without what makes it known."""
    first = _plain(name.removeprefix(stack))
    if first in known:
        return first
    return next((bare for s in _stacks(name) if (bare := _plain(name[len(s) :])) in known), first)


def _plain(name: str) -> str:
    """A name without the wrapper of a compiled part within the network."""
    return name.replace("._orig_mod.", ".")
