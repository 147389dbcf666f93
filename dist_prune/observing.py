"""One observation: a statistic of the calibration images, folded over ranks and kept in a file from time to time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.pruning.channels import Site
from dist_prune.pruning.head_groups import folded
from dist_prune.pruning.probe import taps
from dist_prune.pruning.statistic import Statistic, Tally, gradients
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.resumable_state import ResumableState, identity_of


def weight_of(model: nn.Module, site: Site) -> nn.Parameter:
    """The weight of a site's layer."""
    return model.get_submodule(site.layer).weight  # type: ignore[return-value]


def see(
    model: nn.Module, sites: Sequence[Site], tally: Tally, images: Tensor, labels: Tensor, positions: Tensor,
    backward: bool,
) -> None:  # fmt: skip
    """One micro-batch into a tally, with gradients of the summed cross-entropy where ``backward``."""
    if not backward:
        with torch.no_grad(), taps(model, sites, lambda site, maps: tally.update(site, folded(site, maps), positions)):
            model(images)
        return
    seen: list[tuple[Site, Tensor]] = []

    def note(site: Site, maps: Tensor) -> Tensor:
        copy = maps.clone()  # the network goes on with a copy: an in-place activation must not touch the maps
        seen.append((site, copy if site.side == "in" else maps))  # what enters a layer, and no shortcut around it
        return copy

    tapped = [site for site in sites if site.side != "weight"]
    with torch.enable_grad(), taps(model, tapped, note):
        # gradients are asked for at the sites alone: the parameters' own .grad stays as it was
        logits = model(images.requires_grad_(True))
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        seen += [(site, weight_of(model, site)) for site in sites if site.side == "weight"]
        grads = gradients(loss, seen, tally.statistic, positions)
    with torch.no_grad():
        for (site, maps), grad in zip(seen, grads, strict=True):
            tally.update(site, folded(site, maps.detach()), positions, folded(site, grad))


class Observation:
    """Tables of this rank (``local``) and of all ranks (``merged``, the same on every rank).

    Args:
        statistic, sites: what is gathered, and where.
        images: number of calibration images.
        file: where the merged tables are kept, or None.
        asked: everything else that decides them: the file must have been made for the same.
    """

    def __init__(
        self, statistic: Statistic, sites: Sequence[Site], images: int, device: torch.device, ranks: Ranks,
        file: Path | None, asked: tuple[Any, ...],
    ):  # fmt: skip
        self.sites, self.ranks = sites, ranks
        self.local, self.merged = (Tally(statistic, sites, images, device) for _ in range(2))
        settings = {name: repr(value) for name, value in sorted(vars(statistic).items())}
        names = [site.name for site in sites]
        identity = identity_of(*asked, images, type(statistic).__name__, settings, names)
        self.state = ResumableState(file, identity, ranks)

    @property
    def tables(self) -> dict[str, dict[str, Tensor]]:
        """Site name -> state name -> merged table, on the CPU."""
        found = self.merged.tables
        return {site: {name: table.cpu() for name, table in tables.items()} for site, tables in found.items()}

    def see(self, model: nn.Module, images: Tensor, labels: Tensor, positions: Tensor, backward: bool) -> None:
        """One micro-batch into this rank's tables."""
        see(model, self.sites, self.local, images, labels, positions, backward)

    def save(self, done: int) -> None:
        """Fold all ranks' tables, one collective per word and dtype, and keep them: ``done`` micro-batches are in."""
        for (word, _), tables in self.local.buckets().items():
            self.ranks.merge(word, tables)
        self.merged.merge(self.local)
        self.local.reset()
        self.state.save(self.merged.flat(), micro_batches=done)

    def load(self, say: Callable[[str], None]) -> int:
        """Micro-batches that the file already holds of this observation; 0 where there is none of this kind."""

        def damaged() -> None:
            say(f"  score: {self.state.file} is damaged and left aside; scoring starts over")

        tables, meta = self.state.load(damaged)
        if not meta:
            return 0
        self.merged.load(tables)
        return int(meta["micro_batches"])
