"""The only module that calls torch.distributed: collectives over all ranks, which a single process passes through."""

import contextlib
import os
import pickle
import re
import sys
import time
import warnings
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
REPORT_S = 6.0  # seconds for which a rank that lost others waits for their reports
# words in the errors of collectives that torch itself called
BACKEND_ERRORS = ("gloo", "nccl", "connection", "peer", "timed out", "pair closure")


class RankLostError(PruneError):
    """A collective failed or timed out because another process stopped or hangs."""


@dataclass
class Communicator:
    """Collectives over the processes of a run.

    Every method that says it is a collective has to be called by all ranks, in the same order; a rank that lost another
    one in it raises RankLostError. In a single process each of them returns at once.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: device of the tensors of a collective.
        group: the process group, or None for a single process.
        volume: purpose of the collectives -> (calls, bytes that this rank sent) so far.
        rendezvous: the list of ranks, or None if they did not meet through one.
        control: a group of the same processes whose collectives take tensors on the CPU, or None: plain numbers go
            through it, so that no rank waits for its device.
        timeout_s: seconds for which the others wait for this rank in a collective.
        last_collective_at: time (``time.monotonic()``) at which the last collective ended.
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
        """The communicator of a process group; of a single process if torch.distributed is not initialized.

        It warns if a launcher started several processes and nothing initialized torch.distributed.

        Args:
            group: a process group of torch (default: all processes that were started together).
            device: device of the tensors of a collective (default: the CPU).
            rendezvous: through which the ranks met; it names missing ranks in errors.
        """
        device = device or torch.device("cpu")
        if not dist.is_initialized():
            _warn_if_launched()
            return cls(device=device)
        group = dist.group.WORLD if group is None else group
        control = group if dist.get_backend(group) == "gloo" else None
        return cls(
            dist.get_rank(group), dist.get_world_size(group), device, group, rendezvous=rendezvous, control=control
        )

    def connect(self, timeout_s: float) -> None:
        """Open ``control`` if the group's own backend takes tensors of a device only (nccl); a collective.

        Without a network for gloo between the ranks, ``control`` stays None and plain numbers go through the device.

        Args:
            timeout_s: seconds for which a rank waits in a collective of ``control``.
        """
        if self.world == 1 or self.control is not None:
            return
        try:
            control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        except RuntimeError:
            control = None
        if self.sum_ints(int(control is None)) == [0]:
            self.control = control

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_reduce(self, op: str, tensors: Sequence[Tensor]) -> None:
        """All-reduce tensors in place, as one bucket; a collective.

        Args:
            op: the operation: ``sum``, ``max``, ``min``, or ``rows``: a sum of tables in which each row is zero on
                all ranks but one.
            tensors: of one dtype, in the same number and shapes on every rank; with none, nothing is sent.

        Raises:
            RankLostError: another process stopped or hangs.
        """
        if not tensors or self.world == 1:
            return
        group, device = self._route(tensors[0])
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
        reduce_op = getattr(dist.ReduceOp, _OPS[op])
        self._run_collective(op, flat.nbytes, lambda: dist.all_reduce(flat, op=reduce_op, group=group))
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()

    def sum_ints(self, *counts: int) -> list[int]:
        """Sum integers over all ranks; a collective.

        Args:
            counts: int64 values, as many on every rank.

        Returns:
            The sum of each of them.
        """
        if self.world == 1:
            return list(counts)
        bucket = torch.tensor(counts, dtype=torch.int64)
        self.all_reduce("sum", [bucket])
        return bucket.tolist()

    def max_ints(self, *numbers: int) -> list[int]:
        """Find the largest value of each integer over all ranks; a collective.

        Args:
            numbers: int64 values, as many on every rank.

        Returns:
            The largest value of each of them.
        """
        if self.world == 1:
            return list(numbers)
        bucket = torch.tensor(numbers, dtype=torch.int64)
        self.all_reduce("max", [bucket])
        return bucket.tolist()

    def broadcast(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """Broadcast the tensor of one rank; a collective.

        Args:
            tensor: of the same shape and dtype on every rank.
            owner: the rank whose values are sent.

        Returns:
            The owner's values on the device of ``tensor``; ``tensor`` itself may be overwritten.
        """
        group, device = self._route(tensor)
        moved = tensor.to(device)
        source = dist.get_global_rank(group, owner) if group is not None else 0
        self._run_collective("broadcast", moved.nbytes, lambda: dist.broadcast(moved, source, group=group))
        return moved.to(tensor.device)

    def all_gather_object(self, value: T) -> list[T]:
        """Gather a value of every rank; a collective.

        Args:
            value: small, and such that it can be pickled.

        Returns:
            The values in rank order, on every rank.
        """
        if self.world == 1:
            return [value]
        data, gathered = pickle.dumps(value), [b""] * self.world
        group = self.group if self.control is None else self.control
        self._run_collective("gather", len(data), lambda: dist.all_gather_object(gathered, data, group=group))
        return [pickle.loads(item) for item in gathered]

    def broadcast_object(self, value: T) -> T:
        """Broadcast the value of rank 0; a collective.

        Args:
            value: small, and such that it can be pickled; ignored on the other ranks.

        Returns:
            The value of rank 0, on every rank.
        """
        return self.all_gather_object(value if self.is_main else None)[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here; a collective."""
        self.sum_ints(0)

    def run_on_main(self, function: Callable[[], T]) -> T | None:
        """Run a function on rank 0 while the others wait; a collective.

        Args:
            function: called on rank 0 only, so it must not call collectives.

        Returns:
            Its result on rank 0, None on the others.

        Raises:
            Exception: on rank 0, the error of ``function``.
            PruneError: on the others, with the same text, if ``function`` raised one; RankLostError for other errors.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except Exception as error:  # sent to the others, then raised here
                failure = error
        message = self.broadcast_object(None if failure is None else (isinstance(failure, PruneError), str(failure)))
        if failure is not None:
            raise failure
        if message is not None:
            raise PruneError(message[1]) if message[0] else RankLostError(f"rank 0 failed: {message[1]}")
        return result

    def traffic(self, what: str, size: int) -> None:
        """Count a collective in ``volume``, also one that another library calls; no collective itself.

        Args:
            what: its purpose, for example "gradients".
            size: bytes that this rank sends.
        """
        calls, total = self.volume.get(what, (0, 0))
        self.volume[what] = calls + 1, total + size

    def traffic_since(self, before: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
        """The traffic of this rank since an earlier time; no collective.

        Args:
            before: a copy of ``volume`` from that time.

        Returns:
            Purpose -> ``calls`` and ``bytes``, for purposes with calls since then.
        """
        out = {}
        for what, (calls, total) in sorted(self.volume.items()):
            earlier = before.get(what, (0, 0))
            if calls > earlier[0]:
                out[what] = {"calls": calls - earlier[0], "bytes": total - earlier[1]}
        return out

    def _route(self, tensor: Tensor) -> tuple[Any, torch.device]:
        """The process group that takes a tensor of this device, and the device on which it has to be for that."""
        if self.control is not None and tensor.device.type == "cpu":
            return self.control, tensor.device
        return self.group, self.device

    def _run_collective(self, what: str, size: int, call: Callable[[], Any]) -> None:
        if self.world == 1:
            return
        self.traffic(what, size)
        try:
            call()
            self.last_collective_at = time.monotonic()
        except RuntimeError as error:
            raise lost_rank_error(self, what, error) from error


def join_all(environment: Mapping[str, str], patience_s: float) -> Rendezvous | None:
    """Join the other ranks of this launch through a TCPStore of torch; every rank calls it before any collective.

    Args:
        environment: the environment's variables, with the launcher's.
        patience_s: seconds for which a rank waits for the others.

    Returns:
        The rendezvous, or None for a single process.

    Raises:
        PruneError: see ``Rendezvous.join``.
        PreemptedError: asked to stop while it waited.
    """

    def store(place: str, port: int, world: int, serves: bool) -> Any:
        patience = timedelta(seconds=max(30.0, patience_s))
        kind = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        return kind(place, port, world, serves, patience, wait_for_workers=False, multi_tenant=True)

    return Rendezvous.join(environment, patience_s, store)


def lost_rank_error(comm: Communicator, what: str, error: Exception) -> RankLostError:
    """The error of a rank that lost others in a collective; it names the missing ranks if their peers report.

    Args:
        comm: the processes; the reports of the others are waited for ``REPORT_S`` seconds.
        what: purpose of the collective.
        error: the backend's error.
    """
    text = (str(error).splitlines() or [""])[0]
    timed_out = re.search(r"[Tt]imed out (?:waiting|after) (\d+) ?ms", text)
    if timed_out:
        reason = f"nobody answered for {int(timed_out[1]) / 1000:g} s (cluster.timeout_s)"
    elif "timeout caused pair closure" in text:  # gloo, if another thread timed out first: the text has no time
        reason = "nobody answered for as long as cluster.timeout_s"
    elif re.search(r"closed by peer|reset by peer|[Bb]roken pipe|Connection refused", text):
        reason = "the connection was closed at the other end"
    else:
        reason = text[:200]
    standstill = longest_standstill(comm.last_collective_at)
    if standstill > comm.timeout_s > 0:
        return RankLostError(
            f"rank {comm.rank} of {comm.world} was late for a '{what}': this process stood still for "
            f"{standstill:.0f} s (stopped, suspended, or without a processor), and the others did not wait for it "
            "any longer. Run the same command again to resume: what was saved is intact."
        )
    return RankLostError(
        f"rank {comm.rank} of {comm.world} waited for the others in a '{what}' and lost them: {reason}."
        f"{_missing(comm)} Run the same command again to resume: what was saved is intact."
    )


def _warn_if_launched() -> None:
    """Warn of a launcher's processes that would each do all the work, because nothing made them a group."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdecimal() and int(world) > 1:
        warnings.warn(
            f"{world} processes were started (WORLD_SIZE), but torch.distributed is not initialized: each of them "
            'works alone, on all images. Call torch.distributed.init_process_group("gloo") first '
            '("cpu:gloo,cuda:nccl" on GPUs) to share them out.',
            stacklevel=4,
        )


def _missing(comm: Communicator) -> str:
    """Name the ranks that stopped or hang: ranks that are alive and lost others report so through the rendezvous."""
    if comm.rendezvous is None:
        return " Another process stopped or hangs; its own error says why."
    names = comm.rendezvous.missing("lost", REPORT_S)
    if not names:
        return " All ranks are alive and say the same: the network between them failed."
    return f" No word from {abbreviate(names)}: it stopped or hangs. Its own log says why, if it could write one."


@contextlib.contextmanager
def peer_failures(comm: Communicator) -> Iterator[None]:
    """Turn the errors of collectives that other libraries call (gradients, buffers) into RankLostError.

    Args:
        comm: the processes of the collectives within the ``with`` block.
    """
    try:
        yield
    except RuntimeError as error:
        from_backend = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in BACKEND_ERRORS)
        if comm.world == 1 or not from_backend:
            raise
        raise lost_rank_error(comm, "exchange of gradients or buffers", error) from error


def shutdown(comm: Communicator) -> None:
    """Wait for all ranks, then exit this process at once with code 0; a collective. A single process returns.

    The process group is not destroyed: now and then gloo's threads do not survive that ("terminate called without an
    active exception"), and a finished run would end as a failed one.

    Args:
        comm: all processes.
    """
    if comm.world > 1:
        comm.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
