"""The only door to torch.distributed: what ranks say to one another. One process takes the same path in silence."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_prune.errors import PruneError

T = TypeVar("T")
_OPS = {"sum": "SUM", "rows": "SUM", "max": "MAX", "min": "MIN"}


class RankLostError(PruneError):
    """A collective failed or timed out because another process stopped."""


@dataclass
class Ranks:
    """This process among its equals.

    Attributes:
        rank, world: position and number of processes.
        device: where tensors are put for a collective.
        group: the process group, or None for a single process.
        volume: bytes this rank handed to collectives so far, by what they were for.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    volume: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, group: Any = None, device: torch.device | None = None) -> "Ranks":
        """The ranks of a process group (default: all processes that were started together)."""
        device = device or torch.device("cpu")
        if not dist.is_initialized():
            return cls(device=device)
        group = dist.group.WORLD if group is None else group
        return cls(dist.get_rank(group), dist.get_world_size(group), device, group)

    @property
    def first(self) -> bool:
        """True on the rank that writes files and talks to the user."""
        return self.rank == 0

    def merge(self, word: str, tensors: Sequence[Tensor]) -> None:
        """All-reduce many tensors of one dtype in place, as one bucket, by a merge word (sum, max, min, rows)."""
        if not tensors or self.world == 1:  # nothing to say, so nothing is copied together either
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self.device)
        op = getattr(dist.ReduceOp, _OPS[word])
        self._talk(word, flat, lambda: dist.all_reduce(flat, op=op, group=self.group))
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()

    def total(self, *counts: int) -> list[int]:
        """Sums of integers over all ranks."""
        bucket = torch.tensor(counts, dtype=torch.int64)
        self.merge("sum", [bucket])
        return bucket.tolist()

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each integer over all ranks."""
        bucket = torch.tensor(numbers, dtype=torch.int64)
        self.merge("max", [bucket])
        return bucket.tolist()

    def broadcast(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """The owner's tensor on every rank (shapes and dtypes agree beforehand)."""
        moved = tensor.to(self.device)
        source = dist.get_global_rank(self.group, owner) if self.group is not None else 0
        self._talk("broadcast", moved, lambda: dist.broadcast(moved, source, group=self.group))
        return moved.to(tensor.device)

    def gather(self, value: T) -> list[T]:
        """Every rank's (small, plain) value, in rank order, on every rank."""
        found: list[Any] = [value] * self.world
        self._talk("gather", None, lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def from_first(self, value: T) -> T:
        """The first rank's (small, plain) value on every rank."""
        return self.gather(value if self.first else None)[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.total(0)

    def together(self, act: Callable[[], T]) -> T | None:
        """Run ``act`` on the first rank; where it fails, every rank raises its error (so nobody waits for ever)."""
        result: T | None = None
        failure: Exception | None = None
        if self.first:
            try:
                result = act()
            except Exception as error:  # told to the others, then raised here
                failure = error
        said = self.from_first(None if failure is None else (isinstance(failure, PruneError), str(failure)))
        if failure is not None:
            raise failure
        if said is not None:
            raise PruneError(said[1]) if said[0] else RankLostError(f"rank 0 failed: {said[1]}")
        return result

    def _talk(self, what: str, tensor: Tensor | None, call: Callable[[], Any]) -> None:
        if self.world == 1:
            return
        if tensor is not None:
            self.volume[what] = self.volume.get(what, 0) + tensor.numel() * tensor.element_size()
        try:
            call()
        except RuntimeError as error:
            raise lost(self, what, error) from error


def lost(ranks: Ranks, what: str, error: Exception) -> RankLostError:
    """The error of a rank whose peers are gone."""
    reason = (str(error).splitlines() or [""])[0][:200]
    return RankLostError(
        f"rank {ranks.rank} of {ranks.world} waited for the others in a '{what}' and lost them: {reason}. "
        "Another process stopped or hangs; its own error says why. Run the same command again to resume."
    )


def leave(ranks: Ranks) -> None:
    """The end of a process that worked with others: wait for them, then exit at once with code 0.

    Does nothing for a single process. The group is not taken down: now and then gloo's threads do not outlive that
    ("terminate called without an active exception"), and a finished run would end as a failed one.
    """
    if ranks.world > 1:
        ranks.wait()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
