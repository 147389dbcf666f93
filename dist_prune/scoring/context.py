"""The scoring context on the ranks of a run: collects statistics, maps jobs, counts correct images, trains gates."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.loader import ImageLoader
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
from dist_prune.scoring.parameter_training import train_free_parameters, training_settings
from dist_prune.scoring.statistic_collection import Observation, as_filters, layer_weight
from dist_prune.tasks.base import Task
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.tallies import num_correct
from dist_prune.training.bn_recalibration import batch_statistics
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.fit_model import Loss, fit_model
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker

T = TypeVar("T")


@dataclass
class DistributedScoringContext:
    """A dense network and fixed calibration images; implements ``dist_prune.methods.base.ScoringContext``.

    Every rank has one, with equal values except ``environment`` and ``tracker``. Collective methods are called by all
    ranks in the same order, with equal arguments.

    Attributes:
        model: the bare dense network, on the device of ``environment``.
        graph: its layers and channel groups.
        loader: the training images, with the evaluation transform.
        ids: (n,) int64 dataset ids of the calibration images, ascending; they are the calibration list.
        environment: the device of this rank, and the communicator.
        tracker: progress bars, messages and figures.
        micro_batch: images that go through the network together. The partition does not depend on the ranks.
        seed: the recipe's seed.
        partial: folder of saved progress (one file per call), which a stopped run resumes from; None: nothing is saved.
        identity: fingerprint of everything that decides the scores; saved progress of another identity is not used.
        save_every: micro-batches per rank between two saves of a statistic.
        resumed: calibration images that an earlier, stopped process had already seen.
        record: JSON-lines file of results that outlive scoring (``map_jobs`` with ``keep``), or None.
        lineage: fingerprint that recorded results belong to: ``identity`` without the number of measurements.
        augmented: whether ``count_correct`` sees its images with the training augmentation, by the seed.
        task: decides the loss whose gradients statistics read.
        notes: sentences for the reader of the report on how the scores were made; filled while scoring, per rank.
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
    resumed: int = 0
    record: Path | None = None
    lineage: str = ""
    augmented: bool = False
    task: Task = CLASSIFICATION
    notes: set[str] = field(default_factory=set)
    _observations: int = 0
    _map_calls: int = 0
    _in_job: bool = False
    _records: dict[str, ResultCache] = field(default_factory=dict)
    _masked_accuracies: MaskedAccuracyCache | None = None

    @property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """The outputs of the producers of every free group, the leader of a group first."""
        return self.graph.hook_points

    @property
    def images(self) -> int:
        """Number of calibration images, n."""
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.environment.device

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class numbers of the calibration images, on the CPU."""
        return torch.from_numpy(self.loader.source.labels[self.ids])

    def weight(self, point: HookPoint) -> Tensor:
        """Copy the weight of a hook point's layer.

        Args:
            point: any hook point of the layer. If its channels are whole units, the rows of a unit become one row.

        Returns:
            A copy on the CPU, in the network's dtype; the first axis is the layer's outputs, or its units.
        """
        weight = as_filters(self.model, point, layer_weight(self.model, point).detach())
        return fold_units(point.at_weight, weight).cpu().clone()

    def collect(
        self,
        points: Sequence[HookPoint],
        statistic: Statistic,
        backward: bool = False,
        *,
        train_mode: bool = False,
        augment: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        """Collect a statistic at hook points over all calibration images. Collective.

        Each rank takes every ``world``-th micro-batch. The tables are merged and saved after every ``save_every``
        rounds and when the run is asked to stop; the next process resumes after the last save.

        Args:
            points: hook points, each name once.
            statistic: what is computed at each of them.
            backward: also hand it the gradient of the task's loss, summed over images, at each hook point.
            train_mode: one batch of all images, whose own statistics the batch norms use.
            augment: images get the training augmentation, by the seed.

        Returns:
            Hook point name -> state name -> merged table, on the CPU, the same on every rank.

        Raises:
            PruneError: called inside a job of ``map_jobs``, or the statistic cannot be computed on this network.
            PreemptedError: the run was asked to stop.
        """
        self._refuse_in_job("collect")
        self._observations += 1
        comm, device = self.environment.comm, self.environment.device
        settings = (self.identity, self.micro_batch, train_mode, augment, backward)
        file = self.partial / f"observation_{self._observations}.safetensors" if self.partial is not None else None
        observation = Observation(statistic, points, self.images, device, comm, file, settings)
        if not points:
            return observation.tables
        batches = micro_batches(np.arange(self.images), self.images if train_mode else self.micro_batch)
        done = observation.load(self.tracker.info)
        if done:
            self.resumed = min(done * self.micro_batch, self.images)
            self.tracker.info(f"  score: resumes after {self.resumed} of {self.images} images")
        own = shard(batches[done:], comm.rank, comm.world)
        rounds = -(-(len(batches) - done) // comm.world)
        loaded = self.loader.batches([self.ids[positions] for positions in own], (self.seed, 0) if augment else None)
        remaining = iter(own)
        mode = batch_statistics if train_mode else evaluation_mode
        caption = "score" if self._observations == 1 else f"score, pass {self._observations}"
        with mode(self.model), reproducible_kernels():
            for number in self.tracker.bar(range(1, rounds + 1), rounds, caption):
                positions = next(remaining, None)
                if positions is not None:  # in the last round some ranks have no micro-batch
                    batch = next(loaded)
                    rows = torch.from_numpy(positions).to(device, non_blocking=True)
                    observation.update(self.model, batch, rows, self.task if backward else None)
                stop = preemption.poll(comm)[0]
                seen = min(done + number * comm.world, len(batches))
                if stop or (file is not None and number < rounds and number % self.save_every == 0):
                    observation.save(seen)
                if stop:
                    raise preemption.preempted_error(f"while scoring, after {seen} of {len(batches)} micro-batches")
        if rounds:
            observation.save(len(batches))
        return observation.tables

    def map_jobs(
        self, jobs: Sequence[T], run: Callable[[T], Any], keep: str = "", costs: Sequence[float] | None = None
    ) -> list[Any]:
        """Run independent jobs, each on one rank. Collective.

        Args:
            jobs: the same on every rank; each has the same ``repr`` in every process.
            run: computes the result of one job, without collective methods. Results that are all tensors are saved, and
                not computed again after a stop.
            keep: name of a record of JSON jobs and results in the file ``record``, which outlives scoring; empty: none.
            costs: expected cost of each job in any unit; the most expensive jobs start first. Unused with ``keep``.

        Returns:
            The results in the order of the jobs, on every rank, their tensors on the CPU.

        Raises:
            PruneError: called inside a job.
            PreemptedError: the run was asked to stop.
        """
        self._refuse_in_job("map_jobs")
        comm = self.environment.comm
        if keep:
            if keep not in self._records:
                self._records[keep] = ResultCache(self.record, f"{keep} {self.lineage}", comm)
            record = self._records[keep]
            meter = self.tracker.meter(len(jobs), f"score, {keep}")
            try:
                return self._run_in_jobs(lambda: map_cached(jobs, run, comm, record, progress=meter.update))
            finally:
                meter.close()
        self._map_calls += 1
        file = self.partial / f"shared_{self._map_calls}.safetensors" if self.partial is not None else None
        bar = lambda rounds, count: self.tracker.bar(rounds, count, "jobs")  # noqa: E731
        identity, caption = f"{self.identity} {self.images}", f"call {self._map_calls} of shared jobs"
        return self._run_in_jobs(lambda: map_jobs(jobs, run, comm, bar, file, identity, caption, costs))

    def _run_in_jobs(self, map_: Callable[[], list[Any]]) -> list[Any]:
        """Call a function that runs jobs; meanwhile collective methods are refused."""
        self._in_job = True
        try:
            return map_()
        finally:
            self._in_job = False

    def count_correct(self, group: str, off: Tensor, *, where: Where = "consumed", memory_mb: int = 1024) -> list[int]:
        """Count the images that the network classifies right with some channels of a group set to zero.

        Runs on this rank alone; meant for jobs. Layers before the group are computed once and their activations kept,
        within the memory, until another group is asked for.

        Args:
            group: name of a channel group of C channels.
            off: (m, C) bool, the channels that are zero in each of m masks.
            where: ``consumed``: zero at the inputs of the layers that read the group. ``output``: zero at the raw
                outputs of its producers.
            memory_mb: MiB of activations that may be kept; it does not change a count.

        Returns:
            m counts of calibration images.
        """
        if self._masked_accuracies is None:
            ids_of_batches = micro_batches(self.ids, self.micro_batch)
            augment = (self.seed, 0) if self.augmented else None

            def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
                loaded = self.loader.batches(ids_of_batches[start:], augment)
                return ((batch.images, batch.labels) for batch in loaded)

            self._masked_accuracies = MaskedAccuracyCache(self.model, self.graph, batches)
        masked_accuracy = self._masked_accuracies.for_group(group, where, memory_mb * 2**20)
        counts = masked_accuracy.evaluate(off, num_correct).tolist()
        if masked_accuracy.runs_whole_network:
            self.notes.add(f"every coalition of {group} cost a whole forward pass: the network could not be cut there")
        return counts

    def checkpoint(self, name: str, tables: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Save or load the state of a long computation of the method. Collective.

        Args:
            name: of the computation, as a part of a file name.
            tables: the state to save; equal on all ranks. None: load.

        Returns:
            The saved tables; when loading, those of an earlier, stopped process on the CPU, or {}.

        Raises:
            PruneError: called inside a job of ``map_jobs``, or the disk refuses.
            PreemptedError: the run was asked to stop; the tables are saved.
        """
        self._refuse_in_job("checkpoint")
        file = None if self.partial is None else self.partial / f"kept_{name}.safetensors"
        state = ResumableState(file, f"{self.identity} {self.images}", self.environment.comm)
        if tables is None:
            return state.load()[0]
        state.save(tables)
        if preemption.poll(self.environment.comm)[0]:
            raise preemption.preempted_error("while scoring, inside a computation whose state is saved")
        return dict(tables)

    def train_parameters(
        self,
        parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
        loss: Loss,
        epochs: int,
        lr: float,
        batch: int,
        watch: Callable[[int], Any] = lambda step: None,
        *,
        name: str = "",
        calibration: bool = False,
        train_mode: bool = False,
        **training: Any,
    ) -> list[dict[str, float]]:
        """Train free parameters (gates) while the dense network stays as it is. Collective, except inside a job.

        The order of the images comes from (seed, epoch). Gradients are averaged over the ranks.

        Args:
            parameters: the parameters, or groups of them: dicts with ``params`` and ``lr_scale``.
            loss: ``loss(model, images, labels, ids)`` gives the (k,) losses of a batch.
            epochs: passes over the images.
            lr: learning rate before any decay.
            batch: images per update, over all ranks.
            watch: called after each update with its number, from 0; when a training resumes, first with that of the
                last saved update.
            name: of the checkpoints; empty: none.
            calibration: train on the calibration images instead of all training images.
            train_mode: batch norms use the statistics of their batch.
            **training: further keys of the recipe's ``train`` section.

        Returns:
            The figures of each epoch.
        """
        settings = training_settings(epochs, lr, batch, training)
        environment, tracker = self.environment, self.tracker
        if self._in_job:  # one rank alone
            environment = DistributedEnvironment(self.device, Communicator(device=self.device))
            tracker = Tracker(False)
        loop = Loop(settings, self.loader, environment, tracker, self.seed, "fit", self.ids if calibration else None)
        checkpoints = None
        if name and self.partial is not None:
            key = identity_of(self.identity, name, settings)
            checkpoints = CheckpointManager(self.partial / f"fit_{key[:16]}", key)
        return train_free_parameters(self.model, parameters, loss, loop, watch, checkpoints, train_mode)

    def train_model(
        self,
        model: nn.Module,
        loss: Loss,
        epochs: int,
        lr: float,
        batch: int,
        watch: Callable[[int], Any] = lambda step: None,
        *,
        name: str,
        padding: int | None = None,
        **training: Any,
    ) -> list[dict[str, float]]:
        """Train a whole network in place, in training mode, on the calibration images. Collective.

        Args:
            model: the network; all its parameters and buffers are trained, and saved in checkpoints.
            loss: ``loss(model, images, labels, ids)`` gives the (k,) losses of a batch.
            epochs: passes over the images that are not held out.
            lr: learning rate before any decay.
            batch: images per update, over all ranks.
            watch: called after each update with its number, from 0; returns figures for the trackers, or None.
            name: of the training, its checkpoints and figures.
            padding: pixels of padding before a random crop, instead of the recipe's.
            **training: further keys of the recipe's ``train`` section, ``selection`` and ``holdout`` among them.

        Returns:
            The figures of each epoch.

        Raises:
            PruneError: called inside a job of ``map_jobs``, or launched with DeepSpeed.
            PreemptedError: the run was asked to stop.
        """
        self._refuse_in_job("train_model")
        return fit_model(model, loss, training_settings(epochs, lr, batch, training), self, name, padding, watch)

    def clone_model(self) -> nn.Module:
        """A deep copy of the bare dense network, on the device."""
        return copy.deepcopy(self.model)

    def steps_per_epoch(self, batch: int, holdout: float = 0.0) -> int:
        """Number of updates per epoch that ``train_model`` makes.

        Args:
            batch: images per update, over all ranks.
            holdout: share of the calibration images that is held out, 0 to 1.
        """
        return steps_per_epoch(len(holdout_split(self.ids, holdout, self.seed)[0]), batch)

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over all ranks, in place. Collective.

        Args:
            tensors: on the device, with equal shapes and dtypes on all ranks.

        Raises:
            PruneError: called inside a job of ``map_jobs``.
        """
        self._refuse_in_job("all_reduce_sum_")
        self.environment.comm.all_reduce("sum", tensors)

    def generator(self, *name: Any) -> torch.Generator:
        """A new random generator (CPU) from the recipe's seed and a name, the same on every rank.

        Args:
            *name: strings and integers that name the draw.
        """
        return seeded_generator(self.seed, *name)

    def _refuse_in_job(self, method: str) -> None:
        """Refuse a collective call inside a job: ranks run different numbers of jobs, so it would never return."""
        if self._in_job:
            raise PruneError(
                f"context.{method} was called inside a job of context.map_jobs; jobs run alone on their rank"
            )
