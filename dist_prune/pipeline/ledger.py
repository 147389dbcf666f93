"""The ledger of a run directory: finished stages, their inputs and results. Imports no torch.

``ledger.jsonl`` grows by one line per finished stage. A stage is skipped if the ledger has a line with the same
fingerprint (of the recipe fields that it reads and the digests of its inputs) and the outputs of that line are present
and unchanged.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from dist_prune.config import safe_parsing
from dist_prune.config.earlier_versions import OLD_NAMES, drop_added_defaults, rename_old_keys
from dist_prune.errors import PruneError, shown
from dist_prune.fileio import (
    append_lines,
    canonical,
    digest,
    file_digest,
    open_append,
    read_json,
    read_text,
    seal,
    unseal,
    write_atomic,
)

LOOKED_AT_S = 0.5  # seconds for which a lock is waited for: `dist-prune status` holds it for an instant to look at it


def pick(tree: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """The values of some keys of a recipe.

    Args:
        tree: The resolved recipe, as nested mappings.
        fields: Dotted keys, or names of whole sections.

    Returns:
        Key -> value; None for a key that the recipe lacks.
    """
    out = {}
    for field in fields:
        value: Any = tree
        for step in field.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        out[field] = value
    return out


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys: ``{'a': {'b': 1}}`` -> ``{'a.b': 1}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


@contextlib.contextmanager
def lock_run_directory(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory while the body runs, so that one run at a time uses it.

    Args:
        folder: The run directory; it is created if it is missing. Nothing that is there changes.

    Raises:
        PruneError: Another process runs there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_append(folder / ".lock")
    except OSError as error:
        raise PruneError(f"--run-dir: {folder} cannot be used: {error.strerror or error}") from error
    with file:
        _take_lock(file, folder)
        yield


def name_holder(folder: Path, ranks: int) -> None:
    """Write into the lock's file who holds it, once the run directory is known to be the run's own.

    The file holds JSON: ``host``, ``pid``, ``ranks`` and ``began`` (seconds since 1970).

    Args:
        folder: The run directory, locked by this process.
        ranks: Number of processes of the run.
    """
    note = {"host": socket.gethostname(), "pid": os.getpid(), "ranks": ranks, "began": round(time.time(), 3)}
    with contextlib.suppress(OSError), open_append(folder / ".lock") as file:  # a full disk says so where it matters
        file.truncate(0)
        file.write(f"{json.dumps(note)}\n".encode())


def _take_lock(file: IO[bytes], folder: Path) -> None:
    deadline = time.monotonic() + LOOKED_AT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(LOOKED_AT_S / 10)
                continue
            note = read_json(folder / ".lock")
            holder = f" (process {note['pid']} on {note['host']})" if {"pid", "host"} <= note.keys() else ""
            raise PruneError(
                f"another process is running in {folder}{holder}; wait for it, or name another --run-dir"
            ) from error
        except OSError:  # a file system without locks; run without one
            return


@dataclass(frozen=True)
class Ledger:
    """The append-only record of the finished stages of one run directory.

    Attributes:
        folder: The run directory. Outputs are named relative to it.
    """

    folder: Path

    @property
    def file(self) -> Path:
        """The ledger's file, which need not exist."""
        return self.folder / "ledger.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """Every complete line, oldest first. A line that a crash cut off, or that was altered, is left out.

        Returns:
            Dicts with ``stage`` (label), ``fingerprint`` and ``outputs`` (file -> sha256), and normally with ``facts``,
            ``events``, ``outside``, ``world_size``, ``seconds`` and ``at`` (seconds since 1970).
        """
        out = []
        for text in read_text(self.file).splitlines():
            line = unseal(text)
            if line is not None and _well_formed(line):
                out.append(line)
        return out

    def last(self, stage: str) -> dict[str, Any] | None:
        """The newest line of a stage, or None.

        Args:
            stage: The stage's label.
        """
        return next((line for line in reversed(self.lines()) if line["stage"] == stage), None)

    def done(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """The line that proves that a stage is done, or None.

        Args:
            stage: The stage's label.
            fingerprint: The fingerprint that the newest line of the stage must have.

        Returns:
            The line, if it has this fingerprint and every output of it is present and unchanged.
        """
        line = self.last(stage)
        if line is None or line["fingerprint"] != fingerprint:
            return None
        for name, expected in line["outputs"].items():
            path = self.folder / name
            try:
                if not path.is_file() or file_digest(path) != expected:
                    return None
            except OSError:  # unreadable: as good as not there
                return None
        return line

    def complete(self, stage: str) -> dict[str, Any] | None:
        """The newest line of a stage if every output of it is present and unchanged, else None."""
        line = self.last(stage)
        return self.done(stage, line["fingerprint"]) if line is not None else None

    def append(self, line: Mapping[str, Any]) -> None:
        """Add the line of a finished stage, sealed with its digest and dated."""
        append_lines(self.file, [seal({**line, "at": round(time.time(), 3)})])


def _well_formed(line: Mapping[str, Any]) -> bool:
    """Whether a line has the fields that its readers need, with their types."""
    outputs = line.get("outputs")
    return (
        isinstance(line.get("stage"), str)
        and isinstance(line.get("fingerprint"), str)
        and isinstance(outputs, dict)
        and all(isinstance(value, str) for value in outputs.values())
        and all(isinstance(line.get(key, {}), dict) for key in ("facts", "outside"))
        and isinstance(line.get("events", []), list)
    )


# Keys of a training that decide how it is checkpointed, not its result.
CHECKPOINT_KEYS = ("save_every_steps", "checkpoint_every_minutes", "keep_checkpoints", "skip_nonfinite")
# Keys that name a location or a way of running, not what is computed. A run may resume with other values, as long as
# images and checkpoint are those that it read before (stages compare their digests).
NON_IDENTITY_KEYS = (
    "data.root",
    "data.class_map",
    "data.workers",
    "data.backend",
    "data.on_error",
    "data.stage_to",
    "backbone.checkpoint",
    "score.save_every",
    "score.record",
    "repair.memory_mb",
    "cluster",
    *(f"{section}.{key}" for section in ("train", "finetune") for key in CHECKPOINT_KEYS),
)
# Sections that decide the scores: a run directory belongs to one setting of them.
IDENTITY_KEYS = ("backbone", "data", "train", "score", "seed", "method.name")


def bind_recipe(
    folder: Path, recipe: Mapping[str, Any], score_options: Iterable[str] = (), filled: Mapping[str, Any] | None = None
) -> str:
    """Bind a run directory to a recipe: write recipe.yaml, or check that the recipe fits the one that is there.

    Args:
        folder: The run directory; it is created if it is missing.
        recipe: The resolved recipe as nested mappings, with ``${VARIABLES}`` as they were written.
        score_options: The method's options that scoring reads; they are fixed as well.
        filled: The same recipe with the variables' values. Digests of them are kept (not of locations, which may
            change). None: ``recipe`` has no variables.

    Returns:
        A sentence for the log if keys changed that only later stages read, else an empty string.

    Raises:
        PruneError: The directory belongs to a recipe with other backbone, data, training or score keys.
    """
    if folder.exists() and not folder.is_dir():
        raise PruneError(f"--run-dir: {folder} is a file; name a folder (it is created if it is missing)")
    path = folder / "recipe.yaml"
    name = dict(recipe).get("method", {}).get("name", "")
    message = ""
    current = drop_added_defaults(flatten(recipe), name)
    filled_in = drop_added_defaults(flatten(filled or recipe), name)
    values = {
        key: _value_digest(key, filled_in.get(key))
        for key, text in current.items()
        if text != filled_in.get(key) and not _in_sections(key, NON_IDENTITY_KEYS)
    }
    if path.exists() and Ledger(folder).lines():  # nothing is bound before a stage has finished
        try:
            previous = drop_added_defaults(rename_old_keys(flatten(safe_parsing.read_yaml(path))), name)
            digests = rename_old_keys(dict(re.findall(r"^# (\S+) sha256:(\w+)$", path.read_text(), re.M)))
        except (PruneError, AttributeError) as error:
            raise PruneError(f"{path} is damaged, so the content of {folder} is unknown: {error}") from error
        fixed = (*IDENTITY_KEYS, *(f"method.{option}" for option in score_options))
        refused, changed = [], []
        for key in sorted(previous.keys() | current.keys()):
            old, new = previous.get(key), current.get(key)
            recorded = digests.get(key)  # of a value that the environment filled in
            unchanged = (
                recorded == _value_digest(key, filled_in.get(key)) if recorded else old in (new, filled_in.get(key))
            )
            if unchanged or _in_sections(key, NON_IDENTITY_KEYS) or key == "name":
                continue
            change = f"{shown(old)} there, {shown(new)} here" if old != new else f"{shown(new)} has another value here"
            (refused if _in_sections(key, fixed) else changed).append(f"{key}: {change}")
        if refused:
            raise PruneError(
                f"the run directory {folder} belongs to another recipe:\n"
                + "\n".join(f"  - {line}" for line in refused)
                + "\nName another --run-dir, or delete that one to start over."
            )
        if changed:
            message = f"{folder} continues from its scores; changed since: " + "; ".join(changed)
    notes = "".join(f"# {key} sha256:{value}\n" for key, value in values.items())
    write_atomic(path, yaml.safe_dump(dict(recipe), sort_keys=False) + notes)
    return message


def _value_digest(key: str, value: Any) -> str:
    return digest(canonical([OLD_NAMES.get(key, key), value]))[:16]


def _in_sections(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)
