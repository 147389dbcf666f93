"""All ranks must have the same packages with entry points: a name has to mean the same on each."""

from dist_prune import plugins
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError, abbreviate


def check_same_plugins(comm: Communicator) -> None:
    """Compare the installed entry points of all ranks. All ranks call it.

    Args:
        comm: the processes of the run.

    Raises:
        PruneError: on every rank, if a package is missing on a rank, or has another version or other entry points.
    """
    if comm.world == 1:
        return
    by_rank = comm.all_gather_object(plugins.installed_packages())
    odd = next((rank for rank, packages in enumerate(by_rank) if packages != by_rank[0]), None)
    if odd is None:
        return
    here, there = (set(by_rank[rank]) for rank in (0, odd))
    only = [
        f"only rank {rank} has {abbreviate(sorted(own))}"
        for rank, own in ((0, here - there), (odd, there - here))
        if own
    ]
    raise PruneError(
        f"the ranks have different plugins of dist_prune installed: {'; '.join(only)}. Install the same packages "
        "in the same versions on every machine"
    )
