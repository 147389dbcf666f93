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
from dist_prune.data.loader import Batch, ImageLoader
from dist_prune.data.sampling import holdout_split, micro_batches, shard, steps_per_epoch
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.distributed.parallel_map import map_cached, map_jobs
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.distributed.resumable_state import ResumableState, identity_of
from dist_prune.errors import PruneError
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.graph.head_groups import fold_units
from dist_prune.pruning.hooks.capture import reproducible_kernels
from dist_prune.pruning.hooks.gating import Where
from dist_prune.pruning.hooks.masked_accuracy import MaskedAccuracyCache
from dist_prune.pruning.hooks.statistics import Statistic
from dist_prune.pruning.rng import seeded_generator
from dist_prune.scoring.observation import Observation, layer_weight
from dist_prune.training.bn_recalibration import batch_statistics
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.evaluation import num_correct
from dist_prune.training.fit_model import fit_model
from dist_prune.training.fit_parameters import fit_parameters
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker

T = TypeVar("T")


@dataclass
class DistributedScoringContext:
    """Scores one dense network on fixed calibration images.

    Attributes:
        model: the bare dense network, on the machine's device.
        graph: its groups and sites.
        loader: the training images, with the evaluation look.
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
    graph: DependencyGraph
    loader: ImageLoader
    ids: np.ndarray
    environment: DistributedEnvironment
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
    _records: dict[str, ResultCache] = field(default_factory=dict)
    _games: MaskedAccuracyCache | None = None

    @property
    def sites(self) -> tuple[HookPoint, ...]:
        return self.graph.hook_points

    @property
    def images(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.environment.device

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.loader.source.labels[self.ids])

    def weight(self, point: HookPoint) -> Tensor:
        """See methods.base.Bench; a copy."""
        return fold_units(point.at_weight, layer_weight(self.model, point).detach()).cpu().clone()

    def collect(
        self,
        points: Sequence[HookPoint],
        statistic: Statistic,
        backward: bool = False,
        *,
        train_mode: bool = False,
        augment: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        """See methods.base.Bench. Stopped and run again, it goes on from the last save."""
        self._collective("observe")
        self._observations += 1
        comm, device = self.environment.comm, self.environment.device
        asked = (self.identity, self.micro_batch, train_mode, augment, backward)
        file = self.partial / f"observation_{self._observations}.safetensors" if self.partial is not None else None
        found = Observation(statistic, points, self.images, device, comm, file, asked)
        if not points:
            return found.tables
        lists = micro_batches(np.arange(self.images), self.images if train_mode else self.micro_batch)
        done = found.load(self.tracker.info)
        if done:
            self.resumed = min(done * self.micro_batch, self.images)
            self.tracker.info(f"  score: goes on after {self.resumed} of {self.images} images")
        mine = shard(lists[done:], comm.rank, comm.world)
        rounds = -(-(len(lists) - done) // comm.world)
        batches = self.loader.batches([self.ids[part] for part in mine], (self.seed, 0) if augment else None)
        positions, mode = iter(mine), batch_statistics if train_mode else evaluation_mode
        with mode(self.model), reproducible_kernels():
            for number in self.tracker.bar(range(1, rounds + 1), rounds, "score"):
                part = next(positions, None)
                if part is not None:
                    batch = next(batches)
                    places = torch.from_numpy(part).to(device, non_blocking=True)
                    found.update(self.model, batch.images, batch.labels, places, backward)
                stop = preemption.poll(comm)[0]
                seen = min(done + number * comm.world, len(lists))
                if stop or (file is not None and number < rounds and number % self.save_every == 0):
                    found.save(seen)
                if stop:
                    raise preemption.preempted_error(f"while scoring, after {seen} of {len(lists)} micro-batches")
        if rounds:
            found.save(len(lists))
        return found.tables

    def map_jobs(
        self, jobs: Sequence[T], run: Callable[[T], Any], keep: str = "", costs: Sequence[float] | None = None
    ) -> list[Any]:
        """See methods.base.Bench. Tensors are saved: run again, finished jobs are not done again."""
        self._collective("share")
        comm = self.environment.comm
        if keep:
            if keep not in self._records:
                self._records[keep] = ResultCache(self.record, f"{keep} {self.lineage}", comm)
            record = self._records[keep]
            return self._within(lambda: map_cached(jobs, run, comm, record, self.tracker.info))
        self._shares += 1
        file = self.partial / f"shared_{self._shares}.safetensors" if self.partial is not None else None
        bar = lambda rounds, count: self.tracker.bar(rounds, count, "jobs")  # noqa: E731
        asked = (file, f"{self.identity} {self.images}", f"call {self._shares} of shared jobs", costs)
        return self._within(lambda: map_jobs(jobs, run, comm, bar, *asked))

    def _within(self, work: Callable[[], list[Any]]) -> list[Any]:
        """Do what runs jobs; meanwhile collectives are refused."""
        self._in_job = True
        try:
            return work()
        finally:
            self._in_job = False

    def count_correct(self, group: str, off: Tensor, *, where: Where = "consumed", memory_mb: int = 1024) -> list[int]:
        """See methods.base.Bench. On this rank alone: meant for jobs."""
        if self._games is None:
            lists, look = micro_batches(self.ids, self.micro_batch), (self.seed, 0) if self.augmented else None

            def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
                return ((part.images, part.labels) for part in self.loader.batches(lists[start:], look))

            self._games = MaskedAccuracyCache(self.model, self.graph, batches)
        masked_accuracy = self._games.for_group(group, where, memory_mb * 2**20)
        found = masked_accuracy.evaluate(off, num_correct).tolist()
        if masked_accuracy.runs_whole_network:
            self.notes.add(f"every coalition of {group} cost a whole forward pass: the network could not be cut there")
        return found

    def checkpoint(self, name: str, tables: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See methods.base.Bench."""
        self._collective("keep")
        file = None if self.partial is None else self.partial / f"kept_{name}.safetensors"
        state = ResumableState(file, f"{self.identity} {self.images}", self.environment.comm)
        if tables is None:
            return state.load()[0]
        state.save(tables)
        if preemption.poll(self.environment.comm)[0]:
            raise preemption.preempted_error("while scoring, inside a kept computation")
        return dict(tables)

    def train_parameters(
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
        """See methods.base.Bench. The order of the images comes from (seed, epoch)."""
        plain = {"weight_decay": 0.0, "schedule": "constant", "decay_norm_bias": True, **training}
        settings = Training(epochs=epochs, lr=lr, batch=batch, **plain)
        if network is not None:
            self._collective("fit")
            return fit_model(network, loss, settings, self, name, padding, watch)
        device = self.environment.device
        environment = DistributedEnvironment(device, Communicator(device=device)) if self._in_job else self.environment
        tracker = Tracker(False) if self._in_job else self.tracker
        loop = Loop(settings, self.loader, environment, tracker, self.seed, "fit", self.ids if calibration else None)
        checkpoints = None
        if name and self.partial is not None:
            key = identity_of(self.identity, name, settings)
            checkpoints = CheckpointManager(self.partial / f"fit_{key[:16]}", key)

        def loss_of(part: Batch, _epoch: int, _step: int) -> Tensor:
            return loss(self.model, part.images, part.labels, part.ids)

        groups = [item["params"] if isinstance(item, dict) else (item,) for item in parameters]
        theirs = {id(parameter) for group in groups for parameter in group}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in theirs]
        try:
            for parameter in others:  # no gradients where nothing is trained: faster, and .grad stays as it was
                parameter.requires_grad_(False)
            with batch_statistics(self.model) if train_mode else evaluation_mode(self.model):
                return fit_parameters(parameters, loss_of, loop, watch, checkpoints)
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def clone_model(self) -> nn.Module:
        """See methods.base.Bench."""
        return copy.deepcopy(self.model)

    def steps_per_epoch(self, batch: int, holdout: float = 0.0) -> int:
        """See methods.base.Bench."""
        return steps_per_epoch(len(holdout_split(self.ids, holdout, self.seed)[0]), batch)

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        """See methods.base.Bench."""
        self._collective("sum")
        self.environment.comm.all_reduce("sum", tensors)

    def generator(self, *name: Any) -> torch.Generator:
        """See methods.base.Bench."""
        return seeded_generator(self.seed, *name)

    def _collective(self, verb: str) -> None:
        """Jobs are dealt out: ranks have different numbers of them, so a collective inside one would never end."""
        if self._in_job:
            raise PruneError(f"bench.{verb} was called inside a job of bench.share; jobs run alone on their rank")
