"""The bench: all that a paper may ask for, done across ranks. Observe, share, count, fit."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.errors import PruneError
from dist_prune.observing import Observation, weight_of
from dist_prune.pruning.channels import Channels, Site
from dist_prune.pruning.eval_mode import quiet
from dist_prune.pruning.game import Games
from dist_prune.pruning.gating import Where
from dist_prune.pruning.head_groups import folded
from dist_prune.pruning.probe import reproducible_kernels
from dist_prune.pruning.rng import draw
from dist_prune.pruning.statistic import Statistic
from dist_prune.runtime import stopping
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.data.dealing import deal, held_out, micro_batches, steps
from dist_prune.runtime.data.feed import Batch, Feed
from dist_prune.runtime.evaluation import num_correct
from dist_prune.runtime.jobs import recorded, shared
from dist_prune.runtime.machine import Machine
from dist_prune.runtime.record import Record
from dist_prune.runtime.resumable_state import ResumableState, identity_of
from dist_prune.runtime.tracking import Tracker
from dist_prune.runtime.training.learn import learn
from dist_prune.runtime.training.loop import Loop
from dist_prune.runtime.training.loose import fit
from dist_prune.runtime.training.recalibrate import own_statistics
from dist_prune.runtime.training.states import States

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
        record: file of single measurements that stay when scoring is done, or None.
        lineage: what a measurement on record must belong to: everything but how many there are to be.
        augmented: whether ``count`` sees its images with the training augmentation (by the seed).
        notes: what a reader of the report should know of how the scores were made.
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
    record: Path | None = None
    lineage: str = ""
    augmented: bool = False
    notes: set[str] = field(default_factory=set)
    _observations: int = 0
    _shares: int = 0
    _in_job: bool = False
    _records: dict[str, Record] = field(default_factory=dict)
    _games: Games | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.channels.sites

    @property
    def images(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.machine.device

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.feed.source.labels[self.ids])

    def weight(self, site: Site) -> Tensor:
        """See methods.method.Bench; a copy."""
        return folded(site.at_weight, weight_of(self.model, site).detach()).cpu().clone()

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
        asked = (self.identity, self.micro_batch, train_mode, augment, backward)
        file = self.partial / f"observation_{self._observations}.safetensors" if self.partial is not None else None
        found = Observation(statistic, sites, self.images, device, ranks, file, asked)
        if not sites:
            return found.tables
        lists = micro_batches(np.arange(self.images), self.images if train_mode else self.micro_batch)
        done = found.load(self.tracker.say)
        if done:
            self.resumed = min(done * self.micro_batch, self.images)
            self.tracker.say(f"  score: goes on after {self.resumed} of {self.images} images")
        mine = deal(lists[done:], ranks.rank, ranks.world)
        rounds = -(-(len(lists) - done) // ranks.world)
        batches = self.feed.batches([self.ids[part] for part in mine], (self.seed, 0) if augment else None)
        positions, mode = iter(mine), own_statistics if train_mode else quiet
        with mode(self.model), reproducible_kernels():
            for number in self.tracker.bar(range(1, rounds + 1), rounds, "score"):
                part = next(positions, None)
                if part is not None:
                    batch = next(batches)
                    places = torch.from_numpy(part).to(device, non_blocking=True)
                    found.see(self.model, batch.images, batch.labels, places, backward)
                stop = stopping.poll(ranks)[0]
                seen = min(done + number * ranks.world, len(lists))
                if stop or (file is not None and number < rounds and number % self.save_every == 0):
                    found.save(seen)
                if stop:
                    raise stopping.leave(f"while scoring, after {seen} of {len(lists)} micro-batches")
        if rounds:
            found.save(len(lists))
        return found.tables

    def share(
        self, jobs: Sequence[T], run: Callable[[T], Any], keep: str = "", costs: Sequence[float] | None = None
    ) -> list[Any]:
        """See methods.method.Bench. Tensors are saved: run again, finished jobs are not done again."""
        self._collective("share")
        ranks = self.machine.ranks
        if keep:
            if keep not in self._records:
                self._records[keep] = Record(self.record, f"{keep} {self.lineage}", ranks)
            record = self._records[keep]
            return self._within(lambda: recorded(jobs, run, ranks, record, self.tracker.say))
        self._shares += 1
        file = self.partial / f"shared_{self._shares}.safetensors" if self.partial is not None else None
        bar = lambda rounds, count: self.tracker.bar(rounds, count, "jobs")  # noqa: E731
        asked = (file, f"{self.identity} {self.images}", f"call {self._shares} of shared jobs", costs)
        return self._within(lambda: shared(jobs, run, ranks, bar, *asked))

    def _within(self, work: Callable[[], list[Any]]) -> list[Any]:
        """Do what runs jobs; meanwhile collectives are refused."""
        self._in_job = True
        try:
            return work()
        finally:
            self._in_job = False

    def count(self, group: str, off: Tensor, *, where: Where = "consumed", memory_mb: int = 1024) -> list[int]:
        """See methods.method.Bench. On this rank alone: meant for jobs."""
        if self._games is None:
            lists, look = micro_batches(self.ids, self.micro_batch), (self.seed, 0) if self.augmented else None

            def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
                return ((part.images, part.labels) for part in self.feed.batches(lists[start:], look))

            self._games = Games(self.model, self.channels, batches)
        game = self._games.of(group, where, memory_mb * 2**20)
        found = game.tally(off, num_correct).tolist()
        if game.whole:
            self.notes.add(f"every coalition of {group} cost a whole forward pass: the network could not be cut there")
        return found

    def keep(self, name: str, tables: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See methods.method.Bench."""
        self._collective("keep")
        file = None if self.partial is None else self.partial / f"kept_{name}.safetensors"
        state = ResumableState(file, f"{self.identity} {self.images}", self.machine.ranks)
        if tables is None:
            return state.load()[0]
        state.save(tables)
        if stopping.poll(self.machine.ranks)[0]:
            raise stopping.leave("while scoring, inside a kept computation")
        return dict(tables)

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
        calibration: bool = False,
        train_mode: bool = False,
        padding: int | None = None,
        **training: Any,
    ) -> list[dict[str, float]]:
        """See methods.method.Bench. The order of the images comes from (seed, epoch)."""
        plain = {"weight_decay": 0.0, "schedule": "constant", "decay_norm_bias": True, **training}
        settings = Training(epochs=epochs, lr=lr, batch=batch, **plain)
        if network is not None:
            self._collective("fit")
            return learn(network, loss, settings, self, name, padding, watch)
        device = self.machine.device
        machine = Machine(device, Ranks(device=device)) if self._in_job else self.machine
        tracker = Tracker(False) if self._in_job else self.tracker
        loop = Loop(settings, self.feed, machine, tracker, self.seed, "fit", self.ids if calibration else None)
        states = None
        if name and self.partial is not None:
            key = identity_of(self.identity, name, settings)
            states = States(self.partial / f"fit_{key[:16]}", key)

        def loss_of(part: Batch, _epoch: int, _step: int) -> Tensor:
            return loss(self.model, part.images, part.labels, part.ids)

        groups = [item["params"] if isinstance(item, dict) else (item,) for item in parameters]
        theirs = {id(parameter) for group in groups for parameter in group}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in theirs]
        try:
            for parameter in others:  # no gradients where nothing is trained: faster, and .grad stays as it was
                parameter.requires_grad_(False)
            with own_statistics(self.model) if train_mode else quiet(self.model):
                return fit(parameters, loss_of, loop, watch, states)
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

    def draw(self, *name: Any) -> torch.Generator:
        """See methods.method.Bench."""
        return draw(self.seed, *name)

    def _collective(self, verb: str) -> None:
        """Jobs are dealt out: ranks have different numbers of them, so a collective inside one would never end."""
        if self._in_job:
            raise PruneError(f"bench.{verb} was called inside a job of bench.share; jobs run alone on their rank")
