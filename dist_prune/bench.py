"""The bench: all that a paper may ask for, done across ranks. Observe, share, measure, fit."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.pruning.channels import Channels, Site
from dist_prune.pruning.gates import gated
from dist_prune.pruning.probe import quiet, taps
from dist_prune.pruning.renew import draw
from dist_prune.pruning.statistic import Statistic, Tally
from dist_prune.recipe import Training
from dist_prune.runtime import checkpoint, stopping
from dist_prune.runtime.data.dealing import deal, held_out, micro_batches, steps
from dist_prune.runtime.data.feed import Batch, Feed
from dist_prune.runtime.machine import Machine
from dist_prune.runtime.tracking import Tracker
from dist_prune.runtime.training.learn import learn
from dist_prune.runtime.training.loop import Loop, fit
from dist_prune.runtime.training.recalibrate import own_statistics

T = TypeVar("T")


@dataclass
class Bench:
    """Scores one dense network on fixed calibration images.

    Attributes:
        model: the bare dense network, on the machine's device.
        channels: its groups and sites.
        feed: the training images, with the evaluation look.
        ids: (n,) dataset ids of the calibration images, ascending.
        micro_batch: images that go through the network together; the partition does not depend on the ranks.
        seed: of the recipe.
        partial: folder where partly merged statistics are saved, one file per observation, or None.
        identity: what the partial file must belong to.
        save_every: micro-batches per rank between two saves.
    """

    model: nn.Module
    channels: Channels
    feed: Feed
    ids: np.ndarray
    machine: Machine
    tracker: Tracker
    micro_batch: int = 50
    seed: int = 0
    partial: Path | None = None
    identity: str = ""
    save_every: int = 100
    resumed: int = 0  # calibration images that an earlier, stopped process had already seen
    _observations: int = 0
    _shares: int = 0
    _in_job: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.channels.sites

    @property
    def images(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.feed.source.labels[self.ids])

    def weight(self, site: Site) -> Tensor:
        """See methods.method.Bench; a copy."""
        return self.model.get_submodule(site.layer).weight.detach().cpu().clone()  # type: ignore[union-attr]

    def observe(
        self,
        sites: Sequence[Site],
        statistic: Statistic,
        backward: bool = False,
        *,
        train_mode: bool = False,
        augment: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        """See methods.method.Bench. Stopped and run again, it goes on from the last save."""
        self._collective("observe")
        self._observations += 1
        ranks, device = self.machine.ranks, self.machine.device
        merged = Tally(statistic, sites, self.images, device)
        if not sites:
            return merged.tables
        local = Tally(statistic, sites, self.images, device)
        lists = micro_batches(np.arange(self.images), self.images if train_mode else self.micro_batch)
        file = self.partial / f"observation_{self._observations}.safetensors" if self.partial is not None else None
        key = self._key(sites, statistic, (backward, train_mode, augment))
        done = self._load(file, merged, key)
        mine = deal(lists[done:], ranks.rank, ranks.world)
        rounds = -(-(len(lists) - done) // ranks.world)
        batches = self.feed.batches([self.ids[part] for part in mine], (self.seed, 0) if augment else None)
        positions, mode = iter(mine), own_statistics if train_mode else quiet
        with mode(self.model), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            for number in self.tracker.bar(range(1, rounds + 1), rounds, "score"):
                part = next(positions, None)
                if part is not None:
                    self._see(local, sites, next(batches), torch.from_numpy(part).to(device), backward)
                stop = stopping.poll(ranks)[0]
                seen = min(done + number * ranks.world, len(lists))
                if file is not None and (stop or (number < rounds and number % self.save_every == 0)):
                    self._fold(local, merged)
                    self._save(file, merged, key, seen)
                if stop:
                    raise stopping.leave(f"while scoring, after {seen} of {len(lists)} micro-batches")
        self._fold(local, merged)
        if file is not None and rounds:
            self._save(file, merged, key, len(lists))
        return {site: {name: table.cpu() for name, table in tables.items()} for site, tables in merged.tables.items()}

    def share(self, jobs: Sequence[T], run: Callable[[T], Any]) -> list[Any]:
        """See methods.method.Bench. Tensors are saved: run again, a finished call is not made again."""
        self._collective("share")
        self._shares += 1
        ranks = self.machine.ranks
        file = self.partial / f"shared_{self._shares}.safetensors" if self.partial is not None else None
        key = hashlib.sha256(repr((self.identity, self.images, list(jobs))).encode()).hexdigest()
        saved = self._shared(file, key, len(jobs))
        if saved is not None:
            return saved
        if stopping.poll(ranks)[0]:
            raise stopping.leave(f"while scoring, before call {self._shares} of shared jobs")
        mine = list(enumerate(jobs))[ranks.rank :: ranks.world]
        self._in_job = True
        try:
            done = [(number, _on_cpu(run(job))) for number, job in self.tracker.bar(mine, len(mine), "jobs")]
        finally:
            self._in_job = False
        parts = ranks.gather(done)
        results = [result for _, result in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]
        if file is not None and results and all(isinstance(result, Tensor) for result in results):
            tables = {str(number): result for number, result in enumerate(results)}
            ranks.together(lambda: checkpoint.save(file, tables, {"identity": key}))
        return results

    @torch.no_grad()
    def measure(self, off: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See methods.method.Bench."""
        self._collective("measure")
        ranks, correct, total = self.machine.ranks, 0, 0
        mine = deal(micro_batches(self.ids, self.micro_batch), ranks.rank, ranks.world)
        with quiet(self.model), gated(self.model, self.channels, off):
            for part in self.feed.batches(mine):
                correct += int((self.model(part.images).argmax(1) == part.labels).sum())
                total += len(part.ids)
        correct, total = ranks.total(correct, total)
        return correct, total

    def fit(
        self,
        parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
        loss: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
        epochs: int,
        lr: float,
        batch: int,
        watch: Callable[[int], Any] = lambda step: None,
        *,
        network: nn.Module | None = None,
        name: str = "",
        padding: int | None = None,
        **training: Any,
    ) -> list[dict[str, float]]:
        """See methods.method.Bench. The order of the images comes from (seed, epoch)."""
        plain = {"weight_decay": 0.0, "schedule": "constant", **training}
        settings = Training(epochs=epochs, lr=lr, batch=batch, **plain)
        if network is not None:
            self._collective("fit")
            return learn(network, loss, settings, self, name, padding, watch)
        loop = Loop(settings, self.feed, self.machine, self.tracker, self.seed, "fit")

        def loss_of(part: Batch, _epoch: int, _step: int) -> Tensor:
            return loss(self.model, part.images, part.labels, part.ids)

        self._collective("fit")
        groups = [item["params"] if isinstance(item, dict) else (item,) for item in parameters]
        theirs = {id(parameter) for group in groups for parameter in group}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in theirs]
        try:
            for parameter in others:  # no gradients where nothing is trained: faster, and .grad stays as it was
                parameter.requires_grad_(False)
            with quiet(self.model):
                return fit(parameters, loss_of, loop, watch)
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def network(self) -> nn.Module:
        """See methods.method.Bench."""
        return copy.deepcopy(self.model)

    def steps(self, batch: int, holdout: float = 0.0) -> int:
        """See methods.method.Bench."""
        return steps(len(held_out(self.ids, holdout, self.seed)[0]), batch)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """See methods.method.Bench."""
        self._collective("sum")
        self.machine.ranks.merge("sum", tensors)

    def broadcast(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """See methods.method.Bench."""
        self._collective("broadcast")
        return self.machine.ranks.broadcast(tensor, owner)

    def draw(self, *name: Any) -> torch.Generator:
        """See methods.method.Bench."""
        return draw(self.seed, *name)

    def _see(self, local: Tally, sites: Sequence[Site], part: Batch, positions: Tensor, backward: bool) -> None:
        if not backward:
            with torch.no_grad(), taps(self.model, sites, lambda site, maps: local.update(site, maps, positions)):
                self.model(part.images)
            return
        seen: list[tuple[Site, Tensor]] = []

        def see(site: Site, maps: Tensor) -> Tensor:
            seen.append((site, maps))
            return maps.clone()  # the network goes on with a copy: an in-place activation must not touch the maps

        with torch.enable_grad(), taps(self.model, sites, see):
            # gradients are asked for at the maps alone: the parameters' own .grad stays as it was
            logits = self.model(part.images.requires_grad_(True))
            loss = functional.cross_entropy(logits, part.labels, reduction="sum")
            grads = torch.autograd.grad(loss, [maps for _, maps in seen])
        with torch.no_grad():
            for (site, maps), grad in zip(seen, grads, strict=True):
                local.update(site, maps.detach(), positions, grad)

    def _fold(self, local: Tally, merged: Tally) -> None:
        """All ranks' local tables into ``merged`` (the same on every rank): one collective per word and dtype."""
        for (word, _), tables in local.buckets().items():
            self.machine.ranks.merge(word, tables)
        merged.merge(local)
        local.reset()

    def _collective(self, verb: str) -> None:
        """Jobs are dealt out: ranks have different numbers of them, so a collective inside one would never end."""
        if self._in_job:
            raise PruneError(f"bench.{verb} was called inside a job of bench.share; jobs run alone on their rank")

    def _key(self, sites: Sequence[Site], statistic: Statistic, how: tuple[bool, ...]) -> str:
        """What a partial statistic must belong to: everything that decides it."""
        settings = {name: repr(value) for name, value in sorted(vars(statistic).items())}
        names = [site.name for site in sites]
        asked = (self.identity, self.micro_batch, self.images, type(statistic).__name__, settings, names, how)
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def _shared(self, file: Path | None, key: str, count: int) -> list[Tensor] | None:
        """The saved results of these very jobs, or None."""
        if file is None or not self.machine.ranks.from_first(file.exists()):
            return None
        try:
            tables, meta = checkpoint.read(file)
        except PruneError:
            return None
        return [tables[str(number)] for number in range(count)] if meta.get("identity") == key else None

    def _save(self, file: Path, merged: Tally, key: str, done: int) -> None:
        meta = {"identity": key, "micro_batches": done}
        self.machine.ranks.together(lambda: checkpoint.save(file, merged.flat(), meta))

    def _load(self, file: Path | None, merged: Tally, key: str) -> int:
        """Micro-batches that a saved partial statistic already holds; 0 where there is none of this kind."""
        if file is None or not self.machine.ranks.from_first(file.exists()):
            return 0
        try:
            tables, meta = checkpoint.read(file)
        except PruneError:
            self.tracker.say(f"  score: {file} is damaged and left aside; scoring starts over")
            return 0
        if meta.get("identity") != key:
            return 0
        merged.load(tables)
        done = int(meta["micro_batches"])
        self.resumed = min(done * self.micro_batch, self.images)
        self.tracker.say(f"  score: goes on after {self.resumed} of {self.images} images")
        return done


def _on_cpu(value: Any) -> Any:
    """A job's result with its tensors on the CPU, to be sent to other ranks."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(inner) for inner in value)
    return value
