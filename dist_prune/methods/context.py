"""What a paper may ask for while it scores: the protocol of the object that ``Method.score`` gets.

``dist_prune.scoring.context.DistributedScoringContext`` implements it on the ranks of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.statistics import Statistic

LARGEST_BATCH = 1000  # images that one forward pass is asked to hold
T = TypeVar("T")


def check_one_batch(images: int) -> None:
    """Check that scoring in training mode can take all calibration images as one batch.

    Args:
        images: number of calibration images.

    Raises:
        PruneError: there are more than 1,000.
    """
    if images > LARGEST_BATCH:
        raise PruneError(
            f"score.images: scoring in training mode takes all images as one batch, and {images:,} are more than "
            f"{LARGEST_BATCH:,}. The released program takes 100; method.fidelity=correct takes any number."
        )


class ScoringContext(Protocol):
    """A dense network, its dependency graph, and computations on the calibration images, done across ranks.

    ``Method.score`` runs on every rank at the same time, with one context per rank. No member names a rank, and every
    answer is the same on all ranks, so ``score`` needs no communication of its own.

    Collective members are ``collect``, ``map_jobs``, ``checkpoint``, ``train_parameters``, ``train_model`` and
    ``all_reduce_sum_``. All ranks call them in the same order, with equal arguments. Inside a job of ``map_jobs`` they
    raise PruneError, except ``train_parameters``, which then trains on the rank of the job alone.

    When the run is asked to stop (SIGTERM, SIGUSR1), a collective member other than ``all_reduce_sum_`` saves its
    progress and raises ``PreemptedError``. A method does not catch it. The next process calls ``score`` again from the
    beginning, and each member finds its saved progress: calls are matched by their order and arguments.

    The network is as it was when ``score`` returns: weights, buffers, mode, ``.grad`` and hooks, unless the method
    declares ``trains_weights``.

    Attributes:
        graph: the layers and channel groups of the network that is scored, after ``Method.prunable``. The groups to
            score are ``graph.free``. In ``dist-prune`` runs they include groups that the recipe excludes from pruning,
            because runs with other exclusions use the same score file.
    """

    graph: DependencyGraph

    @property
    def hook_points(self) -> Sequence[HookPoint]:
        """The outputs of the producers of every free group, the leader of a group first (``graph.hook_points``)."""
        ...

    @property
    def images(self) -> int:
        """Number of calibration images, n."""
        ...

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class number of each calibration image, on the CPU, in the order of the calibration list."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of this rank, for heavy arithmetic of the method."""
        ...

    def weight(self, point: HookPoint) -> Tensor:
        """Copy the weight of a hook point's layer.

        Args:
            point: any hook point of the layer. If its channels are whole units (attention heads, groups of a grouped
                convolution), the rows of one unit become one row.

        Returns:
            A copy on the CPU, in the network's dtype: (out, in / groups, kh, kw) of a convolution, (out, in) of a
            linear layer, (C,) of a norm.
        """
        ...

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

        The images go through the network once, in evaluation mode, in micro-batches of ``score.micro_batch`` images
        that do not depend on the number of ranks.

        Args:
            points: hook points, each name once. No image is read if there are none.
            statistic: what is computed at each of them. Its attributes identify the saved progress, so their ``repr``
                has to be the same in every process.
            backward: also hand ``statistic.update`` the gradient of the task's loss (of a classification the
                cross-entropy), summed over images, at each hook point.
            train_mode: all images form one batch, and batch norms use the statistics of that batch. Running statistics
                stay as they are. For released programs that never call ``eval()``; see ``check_one_batch``.
            augment: images get the training augmentation, drawn from the recipe's seed. For released programs that
                score augmented images.

        Returns:
            ``point.name`` -> state name -> merged table, on the CPU. Shapes and dtypes are those of
            ``statistic.states(point)``; a ``rows`` state has one row per calibration image, (n, ...).

        Raises:
            PruneError: the statistic needs second derivatives and a layer has none.
        """
        ...

    def map_jobs(
        self, jobs: Sequence[T], run: Callable[[T], Any], keep: str = "", costs: Sequence[float] | None = None
    ) -> list[Any]:
        """Run independent jobs, each on one rank. Collective.

        Args:
            jobs: the same on every rank; each has the same ``repr`` in every process.
            run: computes the result of one job. It must depend on nothing but the job and values that are equal on
                all ranks, and must be picklable in its result (tensors arrive on the CPU). Results that are all
                tensors are saved from time to time, so finished jobs are not run again after a stop.
            keep: name of a lasting record of jobs and results, which then are JSON values (tuples become lists).
                Recorded results of this run, or of an earlier one with the same network, images and options, are used
                again. See ``refinable``. Empty: no record.
            costs: expected cost of each job in any unit; the most expensive jobs start first. Unused with ``keep``.

        Returns:
            The results in the order of the jobs, on every rank.

        Raises:
            PruneError: ``run`` called a collective member.
        """
        ...

    def count_correct(
        self, group: str, off: Tensor, *, where: Literal["consumed", "output"] = "consumed", memory_mb: int = 1024
    ) -> list[int]:
        """Count the calibration images that the network classifies right with some channels of a group set to zero.

        Not collective: it runs on this rank alone and is meant for jobs of ``map_jobs``. The images have the training
        augmentation if ``Method.augmented``.

        Args:
            group: name of a channel group of C channels.
            off: (m, C) bool, the channels that are zero in each of m masks.
            where: ``consumed`` sets them to zero at the inputs of all layers that read the group, which is the same as
                removing them. ``output`` sets the raw outputs of its producers to zero; a batch norm after them still
                adds its shift.
            memory_mb: MiB of activations that may be kept on the device, so that calls for the same group do not
                compute the layers before it again. It does not change a count.

        Returns:
            m counts, each from 0 to n.
        """
        ...

    def checkpoint(self, name: str, tables: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Save or load the state of a long computation of the method. Collective.

        Args:
            name: of the computation, as a part of a file name.
            tables: the state to save; equal on all ranks. None: load.

        Returns:
            The saved tables. When loading: those that an earlier, stopped process saved under this name, on the CPU,
            or {} if there are none.
        """
        ...

    def train_parameters(
        self,
        parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
        loss: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
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

        Gradients are averaged over the ranks. The order of the images comes from (seed, epoch).

        Args:
            parameters: the parameters, changed in place, or groups of them: dicts with ``params`` and ``lr_scale``,
                the factor of the group's learning rate.
            loss: ``loss(model, images, labels, ids)`` gives the (k,) losses of a batch. ``model`` is the dense
                network, ``images`` (k, C, H, W) and ``labels`` (k,) int64 are on the device, ``ids`` (k,) int64 are
                dataset ids on the CPU.
            epochs: passes over the images.
            lr: learning rate before any decay.
            batch: images per update, over all ranks.
            watch: called on every rank after each update, with its number from 0. When a stopped training resumes, it
                is first called with the number of the last update that was saved.
            name: name of the training's checkpoints, so that a stopped training resumes inside. Empty: no checkpoints.
            calibration: train on the calibration images instead of all training images.
            train_mode: batch norms use the statistics of their batch; running statistics stay as they are.
            **training: further keys of the recipe's ``train`` section (``optimizer``, ``momentum`` and so on).
                Defaults that differ from the recipe's: ``weight_decay`` 0, ``schedule`` constant, ``decay_norm_bias``
                true.

        Returns:
            The figures of each epoch: ``epoch`` (from 1), ``loss`` and others of the training loop.
        """
        ...

    def train_model(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
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

        All parameters and buffers of ``model`` are trained and saved. Batch norms use the images of all ranks. With
        ``selection="holdout"`` a share ``holdout`` of the calibration images is not trained on and decides which epoch
        is kept. A training that has finished is loaded instead of repeated.

        Args:
            model: for example a copy by ``clone_model``, with gates or masks of its own.
            loss: as in ``train_parameters``; its first argument is ``model``, wrapped for several ranks.
            epochs: passes over the images.
            lr: learning rate before any decay.
            batch: images per update, over all ranks.
            watch: called on every rank after each update, with its number from 0. It may return figures for the
                trackers: name -> number, or tensor for a histogram.
            name: name of the training, its checkpoints and its figures.
            padding: pixels of zero padding before a random crop, instead of the recipe's.
            **training: as in ``train_parameters``.

        Returns:
            The figures of each epoch.

        Raises:
            PruneError: the run was launched with DeepSpeed, which shards weights.
        """
        ...

    def clone_model(self) -> nn.Module:
        """A deep copy of the bare dense network, on the device, for ``train_model``."""
        ...

    def steps_per_epoch(self, batch: int, holdout: float = 0.0) -> int:
        """Number of updates per epoch that ``train_model`` makes.

        Args:
            batch: images per update, over all ranks.
            holdout: share of the calibration images that is held out, 0 to 1.
        """
        ...

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over all ranks, in place. Collective.

        Sums of integers are exact. Sums of floats depend in their last bits on the number of ranks; use the ``rows``
        states of a statistic if a plan has to be the same on any number of them.

        Args:
            tensors: on the device, with equal shapes and dtypes on all ranks.
        """
        ...

    def generator(self, *name: Any) -> torch.Generator:
        """A new random generator (CPU) from the recipe's seed and a name: the same on every rank and in every process.

        Args:
            *name: strings and integers that name the draw. A method never uses torch's global generator.
        """
        ...
