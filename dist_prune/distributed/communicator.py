"""The only door to torch.distributed: what ranks say to one another. One process takes the same path in silence."""

import contextlib
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_prune.distributed.rendezvous import Rendezvous
from dist_prune.distributed.watchdog import longest_standstill
from dist_prune.errors import PruneError, abbreviate

T = TypeVar("T")
_OPS = {"sum": "SUM", "rows": "SUM", "max": "MAX", "min": "MIN"}
REPORT_S = 6.0  # for which a rank that lost others waits to hear who else did
# in errors of a collective that torch itself called
FROM_BELOW = ("gloo", "nccl", "connection", "peer", "timed out", "pair closure")


class RankLostError(PruneError):
    """A collective failed or timed out because another process stopped."""


@dataclass
class Communicator:
    """This process among its equals.

    Attributes:
        rank, world: position and number of processes.
        device: where tensors are put for a collective.
        group: the process group, or None for a single process.
        volume: (calls, bytes this rank handed over) of its collectives so far, by what they were for.
        roll: who is here, or None where nobody called the roll.
        control: a group of the same processes whose collectives take tensors on the CPU, or None: plain numbers go
            through it, so that no device is waited for.
        timeout_s: for which others wait for this rank.
        heard: when the last of its collectives ended.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    volume: dict[str, tuple[int, int]] = field(default_factory=dict)
    rendezvous: Rendezvous | None = None
    control: Any = None
    timeout_s: float = 0.0
    last_collective_at: float = 0.0

    @classmethod
    def of(
        cls, group: Any = None, device: torch.device | None = None, rendezvous: Rendezvous | None = None
    ) -> "Communicator":
        """The ranks of a process group (default: all processes that were started together)."""
        device = device or torch.device("cpu")
        if not dist.is_initialized():
            return cls(device=device)
        group = dist.group.WORLD if group is None else group
        control = group if dist.get_backend(group) == "gloo" else None
        return cls(dist.get_rank(group), dist.get_world_size(group), device, group, roll=rendezvous, control=control)

    def connect(self, timeout_s: float) -> None:
        """Open ``control`` where the group's own collectives take tensors of a device only; called on every rank.

        Where gloo finds no network between the ranks there is none, and plain numbers go through the device.
        """
        if self.world == 1 or self.control is not None:
            return
        try:
            made = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        except RuntimeError:
            made = None
        if self.sum_ints(int(made is None)) == [0]:
            self.control = made

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and talks to the user."""
        return self.rank == 0

    def all_reduce(self, word: str, tensors: Sequence[Tensor]) -> None:
        """All-reduce many tensors of one dtype in place, as one bucket, by a merge word (sum, max, min, rows)."""
        if not tensors or self.world == 1:  # nothing to say, so nothing is copied together either
            return
        group, device = self._way(tensors[0])
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
        op = getattr(dist.ReduceOp, _OPS[word])
        self._talk(word, flat.nbytes, lambda: dist.all_reduce(flat, op=op, group=group))
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()

    def sum_ints(self, *counts: int) -> list[int]:
        """Sums of integers over all ranks."""
        if self.world == 1:
            return list(counts)
        bucket = torch.tensor(counts, dtype=torch.int64)
        self.all_reduce("sum", [bucket])
        return bucket.tolist()

    def max_ints(self, *numbers: int) -> list[int]:
        """The largest of each integer over all ranks."""
        if self.world == 1:
            return list(numbers)
        bucket = torch.tensor(numbers, dtype=torch.int64)
        self.all_reduce("max", [bucket])
        return bucket.tolist()

    def broadcast(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """The owner's tensor on every rank (shapes and dtypes agree beforehand)."""
        group, device = self._way(tensor)
        moved = tensor.to(device)
        source = dist.get_global_rank(group, owner) if group is not None else 0
        self._talk("broadcast", moved.nbytes, lambda: dist.broadcast(moved, source, group=group))
        return moved.to(tensor.device)

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's (small, plain) value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        data, found = pickle.dumps(value), [b""] * self.world
        group = self.group if self.control is None else self.control
        self._talk("gather", len(data), lambda: dist.all_gather_object(found, data, group=group))
        return [pickle.loads(part) for part in found]

    def broadcast_object(self, value: T) -> T:
        """The first rank's (small, plain) value on every rank."""
        return self.all_gather_object(value if self.is_main else None)[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Go on when every rank is here."""
        self.sum_ints(0)

    def run_on_main(self, act: Callable[[], T]) -> T | None:
        """Run ``act`` on the first rank; where it fails, every rank raises its error (so nobody waits for ever)."""
        result: T | None = None
        failure: Exception | None = None
        if self.is_main:
            try:
                result = act()
            except Exception as error:  # told to the others, then raised here
                failure = error
        said = self.broadcast_object(None if failure is None else (isinstance(failure, PruneError), str(failure)))
        if failure is not None:
            raise failure
        if said is not None:
            raise PruneError(said[1]) if said[0] else RankLostError(f"rank 0 failed: {said[1]}")
        return result

    def traffic(self, what: str, size: int) -> None:
        """Note a collective of ``size`` bytes, also one that another library calls."""
        calls, total = self.volume.get(what, (0, 0))
        self.volume[what] = calls + 1, total + size

    def traffic_since(self, before: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
        """What was said after a copy of ``volume`` was taken, as plain values; what was not said is left out."""
        out = {}
        for what, (calls, total) in sorted(self.volume.items()):
            had = before.get(what, (0, 0))
            if calls > had[0]:
                out[what] = {"calls": calls - had[0], "bytes": total - had[1]}
        return out

    def _way(self, tensor: Tensor) -> tuple[Any, torch.device]:
        """The group that a tensor goes through, and where it has to be for that."""
        if self.control is not None and tensor.device.type == "cpu":
            return self.control, tensor.device
        return self.group, self.device

    def _talk(self, what: str, size: int, call: Callable[[], Any]) -> None:
        if self.world == 1:
            return
        self.traffic(what, size)
        try:
            call()
            self.last_collective_at = time.monotonic()
        except RuntimeError as error:
            raise lost_rank_error(self, what, error) from error


def join_all(environment: Mapping[str, str], patience_s: float) -> Rendezvous | None:
    """See Roll.call: the roll lies in a store of torch's."""

    def store(place: str, port: int, world: int, serves: bool) -> Any:
        patience = timedelta(seconds=max(30.0, patience_s))
        kind = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        return kind(place, port, world, serves, patience, wait_for_workers=False, multi_tenant=True)

    return Rendezvous.join(environment, patience_s, store)


def lost_rank_error(comm: Communicator, what: str, error: Exception) -> RankLostError:
    """The error of a rank whose peers are gone: who is missing, as far as the others' reports tell."""
    text = (str(error).splitlines() or [""])[0]
    waited = re.search(r"[Tt]imed out (?:waiting|after) (\d+) ?ms", text)
    if waited:
        reason = f"nobody answered for {int(waited[1]) / 1000:g} s (cluster.timeout_s)"
    elif "timeout caused pair closure" in text:  # gloo, where another thread's wait ran out first: it says no time
        reason = "nobody answered for as long as cluster.timeout_s"
    elif re.search(r"closed by peer|reset by peer|[Bb]roken pipe|Connection refused", text):
        reason = "the connection was closed at the other end"
    else:
        reason = text[:200]
    late = longest_standstill(comm.last_collective_at)
    if late > comm.timeout_s > 0:
        return RankLostError(
            f"rank {comm.rank} of {comm.world} was late for a '{what}': this process stood still for {late:.0f} s "
            "(stopped, suspended, or without a processor), and the others did not wait for it any longer. "
            "Run the same command again to resume: what was saved is intact."
        )
    return RankLostError(
        f"rank {comm.rank} of {comm.world} waited for the others in a '{what}' and lost them: {reason}."
        f"{_missing(comm)} Run the same command again to resume: what was saved is intact."
    )


def _missing(comm: Communicator) -> str:
    """Ranks that lost the others say so on the roll; who says nothing is the one that stopped or hangs."""
    if comm.rendezvous is None:
        return " Another process stopped or hangs; its own error says why."
    names = comm.rendezvous.missing("lost", REPORT_S)
    if not names:
        return " All ranks are alive and say the same: the network between them failed."
    return f" No word from {abbreviate(names)}: it stopped or hangs. Its own log says why, if it could write one."


@contextlib.contextmanager
def peer_failures(comm: Communicator) -> Iterator[None]:
    """Errors of collectives that other libraries call (gradients, buffers) as RankLostError."""
    try:
        yield
    except RuntimeError as error:
        told = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in FROM_BELOW)
        if comm.world == 1 or not told:
            raise
        raise lost_rank_error(comm, "exchange of gradients or buffers", error) from error


def shutdown(comm: Communicator) -> None:
    """The end of a process that worked with others: wait for them, then exit at once with code 0.

    Does nothing for a single process. The group is not taken down: now and then gloo's threads do not outlive that
    ("terminate called without an active exception"), and a finished run would end as a failed one.
    """
    if comm.world > 1:
        comm.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
