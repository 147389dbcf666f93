"""The shard files that a recipe's ``data.root`` names: a folder, a pattern with braces and wildcards, or a list."""

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_prune.config.data import shard_splits
from dist_prune.data.source_forms import StoredFiles
from dist_prune.errors import PruneError, abbreviate

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MOST = 1_000_000  # shards of one pattern
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")  # ends of names


def shard_paths(root: str | Sequence[str], split: str, train: bool, suffix: str, other: str = "") -> list[Path]:
    """Find the shards of one split, in the order of their names; those of a list in the order of the list.

    Args:
        root: the recipe's ``data.root``. A folder: its files with the split's name in theirs, or those in the
            sub-folder of that name. Else a path in which ``{split}`` stands for the split's name, ``{train,val}`` for
            one name per split (the split's own name if it is there, else the first one for training and the second one
            for evaluation), ``{0000..1023}`` for numbers of equal length, and ``*``, ``?`` and ``[...]`` for names.
            Or a list of files, such patterns and folders, in which an entry without a place for the split's name
            belongs to the split in its name (``config.data.shard_splits``).
        split: the recipe's ``data.train_split`` or ``data.eval_split``.
        train: whether it is the training split.
        suffix: of the shards' names, for example ``.tar``.
        other: name of the other split; empty: not known.

    Returns:
        Paths of files that exist, each once.

    Raises:
        PruneError: no file matches, a numbered shard is missing, or both splits would be the same files.
    """
    paths = _found(root, split, train, suffix, other)
    if other and other != split:
        try:
            others = {os.path.abspath(path) for path in _found(root, other, not train, suffix, split)}
        except PruneError:  # said when that split is opened
            others = set()
        if both := [path for path in paths if os.path.abspath(path) in others]:
            raise PruneError(
                f"data.root: {both[0]}{_others(both)} is of both splits, {split!r} and {other!r}, so the evaluation "
                "would see training images: write a pattern with more of the names, "
                f"/data/toy-{{split}}-*{suffix}, or a list of files"
            )
    return _check(paths, suffix)


def _found(root: str | Sequence[str], split: str, train: bool, suffix: str, other: str) -> list[Path]:
    """The shards of one split, each once."""
    if not isinstance(root, str):
        return _once(_of_list(root, split, train, suffix, other))
    path = Path(root).expanduser()
    if path.is_dir():
        return _once(_in_folder(path, split, "data.train_split" if train else "data.eval_split", suffix, other))
    if not any(mark in root for mark in "{*?["):
        if not path.exists():
            raise PruneError(f"data.root: there is no {path}. {_forms(suffix)}")
        raise PruneError(f"data.root: {path} is one file for both splits: name some for each. {_forms(suffix)}")
    pattern, separates = _of_split(str(path), split, train)
    if not separates:
        raise PruneError(f"data.root: {root!r} names the same files for training and evaluation. {_forms(suffix)}")
    return _once(_of_pattern(pattern, suffix))


def _of_list(entries: Sequence[str], split: str, train: bool, suffix: str, other: str) -> list[Path]:
    """The shards that a list names; an entry that names none is an error, but for a folder of the other split."""
    key, paths, packed = "data.train_split" if train else "data.eval_split", [], []
    for entry in entries:
        try:
            of_both = shard_splits(entry, (split, other or split))
        except ValueError as error:
            if other:
                raise PruneError(str(error)) from error
            continue  # of the other split, whose name is not known here
        if split not in of_both:
            continue
        path = Path(entry).expanduser()
        if path.is_dir():
            own = _ending(path, suffix) if split in path.name else _of_split_in(path, split, suffix, other)
            packed += [] if own else _compressed_in(path, split)
            paths += own
        else:
            paths += _of_pattern(_of_split(str(path), split, train)[0], suffix)
    if packed and not paths:
        _check(packed, suffix)
    if not paths:
        raise PruneError(
            f"data.root: none of the {len(entries)} entries of the list holds a *{suffix} of {key}={split}. "
            f"{_forms(suffix)}"
        )
    return paths


def _of_pattern(pattern: str, suffix: str) -> list[Path]:
    """The files of a pattern in which the split is filled in."""
    if not (found := [Path(name) for expanded in _numbers(pattern) for name in _matches(expanded)]):
        raise PruneError(f"data.root: no file is called {pattern}. {_forms(suffix)}")
    return found


def _once(paths: Sequence[Path]) -> list[Path]:
    """Each file once, though it is named twice or in two spellings; a PruneError for two links to one file."""
    named = {Path(os.path.abspath(path)): path for path in reversed(paths)}
    paths = list(named.values())[::-1]
    places: dict[tuple[int, int], Path] = {}
    for path in filter(Path.exists, paths):
        found = path.stat()
        first = places.setdefault((found.st_dev, found.st_ino), path)
        if first is not path:
            raise PruneError(
                f"data.root: {first} and {path} are one file, whose images would count twice: name one of them"
            )
    return paths


def shard_files(shards: Sequence[str], stamps: np.ndarray) -> StoredFiles:
    """Shards as files to be copied.

    Args:
        shards: their paths.
        stamps: (shards, 2) int64, size in bytes and modification time in nanoseconds of each.
    """
    names = [Path(shard).name for shard in shards]
    if len(set(names)) < len(names):  # of several folders
        names = [f"{number:06}-{name}" for number, name in enumerate(names)]
    places = "\0".join(str(Path(shard).resolve()) for shard in shards).encode(errors="surrogateescape")
    key = hashlib.sha256(places + np.ascontiguousarray(stamps, dtype=np.int64).tobytes()).hexdigest()
    return StoredFiles([Path(shard) for shard in shards], names, stamps[:, 0], key)


def _in_folder(folder: Path, split: str, key: str, suffix: str, other: str) -> list[Path]:
    named = _of_split_in(folder, split, suffix, other)
    if not named:
        next(os.scandir(folder), None)  # a folder that may not be read looks empty to glob
    if not named:
        _check(_compressed_in(folder, split)[:1], suffix)
        others = [path.name for path in sorted(folder.glob("*")) if suffix in path.name.lower()]
        listed = f" It holds {abbreviate(others, 4)}: {key}= names another split." if others else ""
        raise PruneError(
            f"data.root: {folder} has no *{split}*{suffix} and no {split}/*{suffix}.{listed or f' {_forms(suffix)}'}"
        )
    return named


def _of_split_in(folder: Path, split: str, suffix: str, other: str) -> list[Path]:
    """Shards in a folder's sub-folder of the split's name, else those with that name in theirs."""
    inner = folder / split
    named = _ending(inner, suffix) if inner.is_dir() else []
    if named:
        return named
    longer = other if split in other and other != split else ""  # train_held-0.tar is not of 'train'
    return [path for path in _ending(folder, suffix) if split in path.name and not (longer and longer in path.name)]


def _ending(folder: Path, suffix: str) -> list[Path]:
    """Entries of a folder with that suffix, in capitals too, in the order of their names."""
    return sorted(path for path in folder.glob("[!.]*") if path.name.lower().endswith(suffix))


def _compressed_in(folder: Path, split: str) -> list[Path]:
    inner = folder / split
    return [
        path for path in sorted([*folder.glob(f"*{split}*"), *inner.glob("*")]) if path.suffix.lower() in COMPRESSED
    ]


def _of_split(pattern: str, split: str, train: bool) -> tuple[str, bool]:
    """Fill in the split; and whether the pattern has a place for it."""
    separates = "{split}" in pattern
    pattern = pattern.replace("{split}", split)
    while choice := _CHOICE.search(pattern):
        names = [name.strip() for name in choice[1].split(",")]
        if split not in names and len(names) != 2:
            raise PruneError(
                f"data.root: {{{choice[1]}}} has {len(names)} names and none is {split!r} "
                f"({'data.train_split' if train else 'data.eval_split'}): write {{TRAIN,EVALUATION}}, or that key"
            )
        name = split if split in names else names[0 if train else 1]
        pattern, separates = pattern[: choice.start()] + name + pattern[choice.end() :], True
    return pattern, separates


def _numbers(pattern: str) -> list[str]:
    """Write out the first range of numbers, and those after it."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if len(match[1]) != len(match[2]) or last < first or last - first >= MOST:
        raise PruneError(f"data.root: {match[0]} is no range of numbers of equal length, for example {{0000..1023}}")
    width, before, after = len(match[1]), pattern[: match.start()], pattern[match.end() :]
    return [name for number in range(first, last + 1) for name in _numbers(f"{before}{number:0{width}}{after}")]


def _matches(pattern: str) -> list[str]:
    if Path(pattern).exists():
        return [pattern]
    folder, name = os.path.split(pattern)
    if any(mark in pattern for mark in "*?["):
        if Path(folder).is_dir():  # whose name may have brackets
            return sorted(glob.glob(os.path.join(glob.escape(folder), name)))
        return sorted(glob.glob(pattern))
    raise PruneError(f"data.root: the shard {pattern} is missing")


def _check(paths: list[Path], suffix: str) -> list[Path]:
    for path in paths:
        if path.suffix.lower() in COMPRESSED:
            raise PruneError(
                f"data.root: {path} is compressed, so no image in it can be read without all before it: unpack it "
                f"(gunzip {path.name}); images are compressed already and hardly grow"
            )
        if not path.is_file():
            raise PruneError(f"data.root: {path} is no regular file")
    return paths


def _others(paths: Sequence[Path]) -> str:
    return f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""


def _forms(suffix: str) -> str:
    return (
        f"Allowed: a folder with train*{suffix} and val*{suffix}, a list of files, or a pattern such as "
        f"/data/imagenet-{{train,val}}-*{suffix} or /data/imagenet-{{split}}-{{0000..0063}}{suffix}, in quotes on a "
        "command line, where a shell would replace braces"
    )
