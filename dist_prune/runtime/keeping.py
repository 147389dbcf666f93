"""The state of a long computation on disk, the same on all ranks, so that a stopped run goes on inside it."""

from collections.abc import Mapping
from pathlib import Path

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
            ranks.together(lambda: checkpoint.save(file, tables, {"identity": identity}))
        if stopping.poll(ranks)[0]:
            raise stopping.leave("while scoring, inside a kept computation")
        return dict(tables)
    if file is None or not ranks.from_first(file.exists()):
        return {}
    try:
        found, meta = checkpoint.read(file)
    except PruneError:
        return {}
    return found if meta.get("identity") == identity else {}
