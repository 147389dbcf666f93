"""Mistakes that the pretend device has to catch, each as a GPU would, and what it has to let pass."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.distributed.communicator import Communicator
from dist_prune.methods import apoz
from tests.device import runs, traffic
from tests.support import pretend_device


def said(ranks: Communicator, name: str) -> str:
    """What a single mistake is answered with; empty where nothing is refused."""
    try:
        REFUSED[name](pretend_device.start())
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""


REFUSED: dict[str, Callable[[torch.device], Any]] = {
    "sum": lambda d: torch.ones(3, device=d) + torch.ones(3),
    "a single number of the device": lambda d: torch.ones((), device=d) + torch.ones(3),
    "product": lambda d: torch.ones(3, 3, device=d) @ torch.ones(3, 3),
    "layer": lambda d: nn.Linear(3, 3)(torch.ones(2, 3, device=d)),
    "labels": lambda d: nn.functional.cross_entropy(torch.ones(2, 3, device=d), torch.zeros(2, dtype=torch.long)),
    "stack of numbers": lambda d: torch.stack([torch.ones((), device=d), torch.ones(())]),
    "concatenation": lambda d: torch.cat([torch.ones(3, device=d), torch.ones(3)]),
    "rows": lambda d: torch.ones(3, device=d).index_select(0, torch.tensor([0])),
    "addition of rows": lambda d: torch.ones(3, device=d).index_add_(0, torch.tensor([0]), torch.ones(1, device=d)),
    "index of the device": lambda d: torch.ones(3)[torch.tensor([0], device=d)],
    "values": lambda d: torch.ones(3, device=d).index_put_((torch.tensor([0], device=d),), torch.ones(1)),
    "numpy": lambda d: torch.ones(3, device=d).numpy(),
    "numpy in silence": lambda d: np.asarray(torch.ones(3, device=d)),
    "another generator": lambda d: torch.randn(3, device=d, generator=torch.Generator()),
    "its generator": lambda d: torch.randn(3, generator=torch.Generator(d)),
    "pinned": lambda d: torch.ones(3, device=d).pin_memory(),
}


def passes(ranks: Communicator) -> list[Any]:
    """What CUDA lets pass, and what it does: no alias of host memory, generators of its own."""
    d = pretend_device.start()
    host = np.zeros(3, np.float32)
    there = torch.from_numpy(host).to(d)
    host += 1
    back = there.cpu()
    back += 1
    torch.manual_seed(3)
    pooled = nn.functional.adaptive_avg_pool2d(
        torch.ones(2, 3, 4, 4, device=d).to(memory_format=torch.channels_last), 1
    )
    first, plain = torch.rand(2, device=d).tolist(), torch.rand(2).tolist()
    torch.manual_seed(3)
    return [
        there.tolist() == [0, 0, 0], first == plain == torch.rand(2).tolist(),
        (torch.ones(3, device=d) + torch.tensor(2.0)).tolist() == [3, 3, 3],
        torch.arange(3, device=d)[torch.tensor([2, 0])].tolist() == [2, 0],
        torch.randn(3, device=d, generator=torch.Generator(d).manual_seed(1)).device == d,
        torch.ones(2).pin_memory().to(d, non_blocking=True).tolist() == [1, 1],
        torch.Generator(d).device == d and torch.Generator().device.type == "cpu",
        pooled.stride() == pretend_device.on_host(pooled).stride() == (3, 1, 3, 3),  # set in place
        nn.Linear(2, 2).to(d).double()(torch.ones(2, dtype=torch.float64, device=d)).dtype == torch.float64,
    ]  # fmt: skip


def counted(ranks: Communicator) -> dict[str, list[int]]:
    """[syncs, bytes up, bytes down, operations] of single steps."""
    d = pretend_device.start()
    x, mask, host = torch.ones(4, device=d), torch.ones(4, device=d) > 0, torch.ones(4)
    number = torch.zeros((), dtype=torch.long, device=d)
    steps: dict[str, Callable[[], Any]] = {
        "item": lambda: float(x[0]), "list": lambda: x.tolist(), "truth": lambda: bool(x[0] > 0),
        "up": lambda: host.to(d), "up, not waited for": lambda: host.to(d, non_blocking=True),
        "down": lambda: x.cpu(), "mask": lambda: x[mask], "nonzero": lambda: x.nonzero(),
        "filled": lambda: x.masked_fill(mask, 0.0), "product": lambda: x * x, "view": lambda: x.view(2, 2),
        "by one of its numbers": lambda: x[number],
    }  # fmt: skip
    out = {}
    for name, step in steps.items():
        with pretend_device.counting() as found:
            step()
        out[name] = [found.syncs, found.up, found.down, found.operations]
    return out


class _OnTheHost(apoz.ZeroCounts):
    """A table that is made beside the maps' device."""

    def update(self, site: Any, tables: Any, maps: Tensor, ids: Tensor, grads: Any) -> None:
        super().update(site, tables, maps, ids, grads)
        tables["zeros"] += torch.zeros(site.width, dtype=torch.int64)


class _Reading(apoz.ZeroCounts):
    """A number that is read in every micro-batch."""

    def update(self, site: Any, tables: Any, maps: Tensor, ids: Tensor, grads: Any) -> None:
        super().update(site, tables, maps, ids, grads)
        assert int(tables["count"][0]) >= 0


@contextlib.contextmanager
def _in_apoz(kind: type[apoz.ZeroCounts]):
    plain = apoz.ZeroCounts
    apoz.ZeroCounts = kind  # type: ignore[misc]
    try:
        yield
    finally:
        apoz.ZeroCounts = plain  # type: ignore[misc]


def left_behind(ranks: Communicator, kind: str) -> str:
    """A method with a tensor left on the CPU."""
    with _in_apoz(_OnTheHost):
        try:
            return runs.planned(ranks, kind, "apoz")
        except RuntimeError as error:
            return str(error)


def reads(ranks: Communicator) -> tuple[float, float]:
    """Syncs per micro-batch of a method, and of the same with a number read in it."""
    bed = traffic.Bed()
    plain = traffic.scoring(bed, "apoz").syncs
    with _in_apoz(_Reading):
        return plain, traffic.scoring(bed, "apoz").syncs
