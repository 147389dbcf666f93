"""The contract between a paper and the harness. A paper is one file beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.methods.options import (
    CoupledOptions,
    MethodOptions,
    QuirkOptions,
    RankingOptions,
    refinable,
    select_only,
)
from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.statistics import Statistic
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.group_scores import reduce_group
from dist_prune.pruning.selection.ranking import SelectionRequest, check_ranking, check_target, select_by_score
from dist_prune.pruning.selection.tie_breaking import orders_of, tie_warnings

__all__ = [
    "TRAINED",
    "CoupledOptions",
    "Method",
    "MethodOptions",
    "QuirkOptions",
    "RankingMethod",
    "RankingOptions",
    "Scores",
    "ScoringContext",
    "WeightRanking",
    "check_one_batch",
    "refinable",
    "select_only",
]  # fmt: skip

Scores = dict[str, Tensor]
TRAINED = "trained/"  # of the scores of a method that trains weights
LARGEST_BATCH = 1000  # images that one forward pass is asked to hold
T = TypeVar("T")


def check_one_batch(images: int) -> None:
    """PruneError if there are too many calibration images for scoring in training mode, as one batch."""
    if images > LARGEST_BATCH:
        raise PruneError(
            f"score.images: scoring in training mode takes all images as one batch, and {images:,} are more than "
            f"{LARGEST_BATCH:,}. The released program takes 100; method.fidelity=correct takes any number."
        )


class ScoringContext(Protocol):
    """All that a paper may ask for. No verb names a rank; every answer is the same on all of them."""

    graph: DependencyGraph

    @property
    def sites(self) -> Sequence[HookPoint]:
        """The producers of every free group."""
        ...

    @property
    def images(self) -> int:
        """Number of calibration images."""
        ...

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class of each calibration image."""
        ...

    def weight(self, point: HookPoint) -> Tensor:
        """The layer's weight, (out, in / groups, kh, kw) or (out, in), on the CPU."""
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
        """Run the calibration images in fixed micro-batches; site name -> state name -> merged table, on the CPU.

        With ``backward`` the statistic also gets the gradient of the summed cross-entropy at each site's output.
        ``train_mode`` and ``augment`` are for released programs that score so: all images in one batch whose own
        statistics the batch norms use (running statistics stay as they are), and training augmentation by the seed.
        """
        ...

    def map_jobs(
        self, jobs: Sequence[T], run: Callable[[T], Any], keep: str = "", costs: Sequence[float] | None = None
    ) -> list[Any]:
        """Deal independent jobs over the ranks, evenly by their ``costs``; the results, in the order of the jobs.

        ``keep`` names a lasting record of jobs and results (JSON values): what is on it, from this or an earlier run,
        is not done again.
        """
        ...

    def count_correct(
        self, group: str, off: Tensor, *, where: Literal["consumed", "output"] = "consumed", memory_mb: int = 1024
    ) -> list[int]:
        """Calibration images that the network gets right without the channels ``off`` (m, C) of a group, m times.

        For jobs: on this rank alone. What does not depend on the group is computed once and kept, within the memory.
        ``where``: see pruning.gating.gate_points.
        """
        ...

    def checkpoint(self, name: str, tables: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The state of a long computation: with ``tables``, keep them under a name, and leave here where the run was
        asked to stop; without, what an earlier, stopped process kept (nothing: {}). The same on all ranks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where a rank does heavy arithmetic."""
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
        network: nn.Module | None = None,
        name: str = "",
        calibration: bool = False,
        train_mode: bool = False,
        padding: int | None = None,
        **training: Any,
    ) -> list[dict[str, float]]:
        """Train parameters (gates) by SGD; ``loss(model, images, labels, ids)`` gives (n,) losses.

        Groups of parameters are dicts with ``params`` and ``lr_scale``, the factor of their learning rate. The dense
        network stays in evaluation mode. Inside a job of ``share`` it trains on this rank alone. With a ``name`` it
        resumes: ``watch`` hears first of the last update that was saved. ``calibration``: on these images instead of
        all training images. ``train_mode``: batch norms use the statistics of their batch. ``training``: keys of the
        recipe's train section (optimizer, momentum ...).

        With ``network`` (and no parameters) that one trains in its place, whole, in training mode, batch norms over
        all ranks, on the calibration images, less those held out (``selection``, ``holdout``). Checkpoints bear
        ``name``: run again it goes on at the step, and a finished one is taken as it is. What ``watch`` returns then
        (numbers, and tensors for histograms) goes to trackers. ``padding``: of the recipe's crops, in place of its own.
        """
        ...

    def clone_model(self) -> nn.Module:
        """A copy of the bare dense network, on the device."""
        ...

    def steps_per_epoch(self, batch: int, holdout: float = 0.0) -> int:
        """Updates per epoch of ``fit`` with a network."""
        ...

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over all ranks, in place, as one bucket; sums of floats depend on how images were dealt."""
        ...

    def generator(self, *name: Any) -> Any:
        """A torch.Generator (CPU) from the recipe's seed and a name: the same on every rank."""
        ...


class Method(ABC):
    """A paper: what it scores, and how scores become a plan.

    Class attributes:
        paper: citation shown by ``dist-prune list methods``.
        Options: the model of its recipe keys.
        equivariant: permuting a group's channels permutes its plan (False for random choices).
        trains_weights: whether surgery starts from weights that ``score`` returns, ``trained/<name>`` for each entry
            of the dense state dict, instead of the dense ones.
        units: whether it can judge whole units, attention heads and groups of grouped convolutions, as channels.
        one_shot: why the network that a plan leaves cannot be scored and cut again (schedule.rounds); empty: it can.
    """

    paper: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    equivariant: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = False
    units: ClassVar[bool] = False
    why_one_shot: ClassVar[str] = ""

    def __init__(self, options: Any):
        self.options = options

    def has(self, quirk: str) -> bool:
        """Whether the options ask for this departure of the released code; see ``QuirkOptions``."""
        return self.options.has(quirk)

    @property
    def calibration_split(self) -> Literal["train", "held_out", "test"]:
        """What the calibration images are drawn from: the training images, those of them that training holds out for
        selection, or (a leak that some released programs have) the test images."""
        return "train"

    @property
    def augmented(self) -> bool:
        """Whether ``bench.count`` sees its images with the training augmentation."""
        return False

    @abstractmethod
    def score(self, context: ScoringContext) -> Scores:
        """Named tensors (CPU) that ``select`` needs, nothing else."""

    @abstractmethod
    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        """A plan from scores. Pure: no data, no network, no randomness, no rank."""

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """The groups that this method can judge; others become protected, with the reason."""
        return graph if self.units else graph.whole_channels_only()

    def layers_to_reinit(self, graph: DependencyGraph) -> tuple[str, ...]:
        """Layers that start from new weights after surgery instead of what is left of the dense ones."""
        return ()

    def similarity_maps(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterable[SimilarityMap]:
        """Pictures for the report: what the scores say of each group. Pure, like ``select``."""
        return ()

    def curves(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterable[Curve]:
        """Lines for the report: how the scores came to be. Pure, like ``select``."""
        return ()

    def orders(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Mapping[str, Sequence[int]]:
        """Group -> its channels in the order in which they would go, for curves over all counts. Pure.

        Empty for methods that do not rank the channels of a group.
        """
        return {}

    def warnings(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> Sequence[str]:
        """What a reader of the scores should know before trusting them. Pure; shown, and noted in the report."""
        return ()

    def cautions(self, graph: DependencyGraph) -> Sequence[str]:
        """What these options are likely to do badly on these groups, known before anything is scored. Pure; shown by
        ``dist-prune check`` and at the start of scoring, and noted in the report."""
        return ()

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        """PruneError where the request asks for what this method does not do; called before any work.

        The default is a ranking method's: a target or a keep ratio, no threshold.
        """
        check_ranking(request)
        check_target(graph, request)

    def prepare(self, graph: DependencyGraph, exclude: Sequence[str], request: SelectionRequest) -> DependencyGraph:
        """The channels (of ``limits``) with the recipe's exclusions; PruneError where nothing can be done with them."""
        unknown = graph.unmatched(exclude)
        if unknown:
            raise PruneError(f"select.exclude: {', '.join(unknown)} match no layer whose channels could be cut")
        for key, globs in request.globs().items():
            unknown = graph.unmatched(globs)
            if unknown:
                raise PruneError(f"select.{key}: {', '.join(unknown)} match no layer whose channels could be cut")
        graph = graph.exclude(exclude).restrict_to(request.include)
        if not graph.free:
            why = "; ".join(f"{group.name}: {group.protected}" for group in graph.groups[:5])
            raise PruneError(f"no channel group is free to be cut: {why}")
        self.check(graph, request)
        return graph

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """Rows of plain values for the report: what other values of the method's knob would cut. None by default."""
        return []

    @staticmethod
    def require_score(scores: Mapping[str, Tensor], name: str) -> Tensor:
        """A score by name; PruneError where the score file was made for something else."""
        if name not in scores:
            raise PruneError(f"the score file has no {name!r}: it was made by another method or for another network")
        return scores[name]


class RankingMethod(Method):
    """A paper that gives every channel a worth: the channels worth least go first, ties to the smaller index.

    Where a group's channels are all worth the same, the seed decides."""

    Options = RankingOptions

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """Free group -> (C,) float64. The default is for scores that bear the groups' names already."""
        return {group.name: self.require_score(scores, group.name) for group in graph.free}

    def orders(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> dict[str, list[int]]:
        return orders_of(self.importance(scores, graph), request.seed)

    def warnings(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> list[str]:
        """Groups whose channels the scores do not tell apart."""
        return tie_warnings(self.importance(scores, graph))

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        graph = self.prunable(graph)
        kept = select_by_score(graph, self.importance(scores, graph), request, self.options.normalise)
        return Plan.from_kept(graph, kept)

    def sum_over_layers(self, scores: Mapping[str, Tensor], graph: DependencyGraph, state: str) -> dict[str, Tensor]:
        """The worth where ``<producer>:<state>`` are (C,) changes of one loss, which add up over layers."""
        parts = {g.name: [self.require_score(scores, f"{name}:{state}") for name in g.producers] for g in graph.free}
        return {name: torch.stack(values).sum(0) for name, values in parts.items()}


class WeightRanking(RankingMethod):
    """A paper that ranks filters by their own weights: one function of a layer's filters.

    The layers of a coupled group become one score by the option ``combine``.
    """

    units = True
    Options = CoupledOptions

    @abstractmethod
    def filter_scores(self, filters: Tensor) -> Tensor:
        """(C, D) float64 weights, one row per filter -> (C,) float64."""

    def score(self, context: ScoringContext) -> Scores:
        """``<site>``: (C,) float64, per producer."""
        return {point.name: self.filter_scores(context.weight(point).double().flatten(1)) for point in context.sites}

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        parts = {group.name: [self.require_score(scores, name) for name in group.producers] for group in graph.free}
        return {name: reduce_group(values, self.options.combine) for name, values in parts.items()}
