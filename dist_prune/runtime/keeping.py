"""The state of a long computation on disk, the same on all ranks, so that a stopped run goes on inside it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.runtime import checkpoint, stopping
from dist_prune.runtime.collectives import Ranks


def kept(file: Path | None, identity: str, tables: Mapping[str, Tensor] | None, ranks: Ranks) -> dict[str, Tensor]:
    """With ``tables``, write them (first rank) and end the run where it was asked to stop; else read them.

    Args:
        file: None: nothing is kept.
        identity: what the tables belong to; others are not read.

    Returns:
        The tables; {} where there are none, or damaged ones.

    Raises:
        PreemptedError: the run was asked to stop; the tables are on disk.
    """
    if tables is not None:
        if file is not None:
            ranks.together(lambda: checkpoint.save_sealed(file, tables, {"identity": identity}))
        if stopping.poll(ranks)[0]:
            raise stopping.leave("while scoring, inside a kept computation")
        return dict(tables)
    return reread(file, identity, ranks)[0]


def reread(
    file: Path | None, identity: str, ranks: Ranks, damaged: Callable[[], None] = lambda: None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tables and meta of a file, the same on all ranks; {} twice where it is missing, damaged, or of another identity.

    A flipped bit among the numbers is damage too; ``damaged`` is called for it.
    """
    if file is None:
        return {}, {}
    tables, meta, there = {}, {}, os.path.lexists(file)
    if there:
        try:
            tables, meta = checkpoint.read_sealed(file)
        except PruneError:
            damaged()
    mine = str(meta.get("seal", "")) if meta.get("identity") == identity else ""
    seals = set(ranks.gather(mine))  # all ranks read the same, or nothing
    return (tables, meta) if seals == {mine} and mine else ({}, {})
