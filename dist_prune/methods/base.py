"""The contract between a paper and the harness: ``Method``, and bases for papers that rank channels.

A paper is one file, or one folder, beside this one. It subclasses ``Method``, ``RankingMethod`` or ``WeightRanking``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods.context import ScoringContext, check_one_batch
from dist_prune.methods.needs import WEIGHTS_ALONE, Needs
from dist_prune.methods.options import (
    CoupledOptions,
    MethodOptions,
    QuirkOptions,
    RankingOptions,
    refinable,
    select_only,
)
from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.group_scores import reduce_group
from dist_prune.pruning.selection.ranking import (
    SelectionRequest,
    check_depth,
    check_ranking,
    check_target,
    hold_blocks,
    select_by_score,
)
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
    "is_ranking",
    "refinable",
    "select_only",
]

Scores = dict[str, Tensor]  # names of the method's choice -> tensors of any shape and dtype, on the CPU
TRAINED = "trained/"  # prefix of the weights among the scores of a method that trains weights


class Method(ABC):
    """A paper: what it computes of a dense network, and how a plan follows from that.

    A run calls ``prunable`` and ``prepare`` before any work, ``score`` on every rank, and later ``select``, which reads
    the score file. All members but ``score`` are pure: their results depend on the options and the arguments alone, not
    on data, networks, files, ranks or global random numbers, and they change no argument. So one score file serves all
    targets, thresholds and ratios, and every rank computes the same plan.

    Attributes:
        paper: citation, shown by ``dist-prune list methods``.
        Options: pydantic model of the method's recipe keys (section ``method``).
        equivariant: whether permuting the channels of a group permutes its plan. False for random choices, and for
            scores with frequent ties, which the smaller index decides.
        trains_weights: whether ``score`` trains weights. The scores then hold ``trained/<key>`` for each key of the
            dense network's state dict, and surgery starts from these weights.
        units: whether the method can score whole units (attention heads, groups of a grouped convolution), each as one
            channel. If False, groups of such units are protected.
        task_needs: what it asks of the task besides images and the gradient of the loss: ``class labels`` (one class
            number for each image), ``class logits``.
        why_one_shot: why a pruned network cannot be scored and pruned again (``schedule.rounds``); empty: it can.
        needs: what ``score`` asks for and costs, for ``dist-prune list methods``; None: not declared.
    """

    paper: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    equivariant: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = False
    units: ClassVar[bool] = False
    task_needs: ClassVar[tuple[str, ...]] = ()
    why_one_shot: ClassVar[str] = ""
    needs: ClassVar[Needs | None] = None

    def __init__(self, options: Any):
        """Keep the options.

        Args:
            options: an instance of ``Options``.
        """
        self.options = options

    def has(self, quirk: str) -> bool:
        """Whether the options select a quirk, a named departure of the released code (``QuirkOptions.has``).

        Raises:
            KeyError: the method has no quirk of that name.
        """
        return self.options.has(quirk)

    @property
    def calibration_split(self) -> Literal["train", "held_out", "test"]:
        """The images that calibration images are drawn from.

        ``train``: the training images. ``held_out``: those that training holds out for selection. ``test``: the test
        images, which some released programs use; the run then warns that its figures are too good.
        """
        return "train"

    @property
    def augmented(self) -> bool:
        """Whether ``ScoringContext.count_correct`` sees its images with the training augmentation."""
        return False

    @abstractmethod
    def score(self, context: ScoringContext) -> Scores:
        """Compute everything that ``select`` needs. Called on every rank at the same time.

        Args:
            context: the network, its graph and the calibration images. Score all of ``context.graph.free``.

        Returns:
            Named tensors on the CPU, the same on every rank. They become the score file (safetensors). Names, shapes
            and dtypes belong to the method; its docstring states them.

        Raises:
            PruneError: the method cannot score this network.
        """

    @abstractmethod
    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        """Make a plan from scores. Pure; called without gradients.

        Args:
            scores: what ``score`` returned, on the CPU.
            graph: the dependency graph of the scored network. Library callers may pass a traced graph as it is, so
                apply ``prunable`` first; applying it twice changes nothing.
            request: target, ratio or threshold, and the floors, caps and rounding of each group.

        Returns:
            The plan, with a reason for every group that keeps all its channels (``Plan.keeping``). At least one channel
            of each group stays.

        Raises:
            PruneError: the scores belong to another method or network, or the request cannot be met.
        """

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """Protect the groups that this method cannot score, with the reason. Pure and idempotent.

        Args:
            graph: as traced.

        Returns:
            The graph in which the other groups are protected. The default protects groups of whole units, unless
            ``units``.
        """
        return graph if self.units else graph.whole_channels_only()

    def layers_to_reinit(self, graph: DependencyGraph) -> tuple[str, ...]:
        """Module paths of the layers that get new weights after surgery, instead of the dense ones that stay.

        Args:
            graph: of the dense network, after ``prunable``.
        """
        return ()

    def similarity_maps(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterable[SimilarityMap]:
        """Similarity matrices of channel groups for the report. Pure.

        Args:
            scores: of the first round.
            graph: of the dense network, after ``prepare``.
            request: of the first round.
        """
        return ()

    def curves(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterable[Curve]:
        """Curves for the report that show how the scores developed. Pure; arguments as in ``similarity_maps``."""
        return ()

    def orders(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Mapping[str, Sequence[int]]:
        """The order in which each group would lose its channels, for curves over all channel counts. Pure.

        Returns:
            Group name -> permutation of 0 to C - 1, the channel that goes first at the front. Empty for methods that do
            not rank the channels of a group.
        """
        return {}

    def warnings(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> Sequence[str]:
        """Reasons to doubt these scores, as sentences. Pure; shown after selection, and noted in the report."""
        return ()

    def cautions(self, graph: DependencyGraph) -> Sequence[str]:
        """Known weaknesses of these options on these groups, as sentences, before anything is scored.

        Pure; shown by ``dist-prune check`` and at the start of scoring, and noted in the report.
        """
        return ()

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        """Check that this method can meet a request. Pure; called before any work.

        The default is for ranking methods: exactly one of a target, a keep ratio and counts, and no threshold.

        Args:
            graph: after ``prunable``, exclusions and inclusions.
            request: of a run, or of one round.

        Raises:
            PruneError: it cannot; names the recipe key and the allowed values.
        """
        check_ranking(request)
        check_target(graph, request)

    def prepare(self, graph: DependencyGraph, exclude: Sequence[str], request: SelectionRequest) -> DependencyGraph:
        """Apply the recipe's exclusions and inclusions, and ``check`` the request. Pure; called before any work.

        Args:
            graph: after ``prunable``.
            exclude: globs of module paths, ``select.exclude``. A group with a producer that matches is protected.
            request: ``request.include``, if not empty, protects all groups that it does not match.

        Returns:
            The graph whose free groups may be pruned.

        Raises:
            PruneError: a glob matches no producer, no group is free, or ``check`` refuses the request.
        """
        unknown = graph.unmatched(exclude)
        if unknown:
            raise PruneError(f"select.exclude: {', '.join(unknown)} match no layer whose channels could be cut")
        for key, globs in request.globs().items():
            unknown = graph.unmatched(globs)
            if unknown:
                raise PruneError(f"select.{key}: {', '.join(unknown)} match no layer whose channels could be cut")
        graph = graph.exclude(exclude).restrict_to(request.include)
        if request.depth and not is_ranking(self):
            raise PruneError(
                "select.depth: blocks are ranked beside channels, and this method chooses channels by a rule of its "
                "own. Set select.depth=false, or take a method that ranks ('dist-prune list methods')"
            )
        check_depth(graph, request)
        graph = hold_blocks(graph, request)
        if request.depth and request.scope == "global" and not getattr(self.options, "normalise", True):
            raise PruneError(
                "select.depth: under select.scope=global blocks compete with channels, whose scores this method does "
                "not normalise. Write method.normalise=true, or another scope"
            )
        if not graph.free and not (request.depth and graph.free_blocks):
            why = "; ".join(f"{group.name}: {group.protected}" for group in graph.groups[:5])
            raise PruneError(f"no channel group is free to be cut: {why}")
        self.check(graph, request)
        return graph

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """Rows for the report: what other values of the method's main option would remove. Pure.

        Returns:
            One dict per row, column -> string, number or None; every row has the same columns. Empty: no table.
        """
        return []

    @staticmethod
    def require_score(scores: Mapping[str, Tensor], name: str) -> Tensor:
        """Look up a score by name.

        Raises:
            PruneError: it is missing, because the scores belong to another method or network.
        """
        if name not in scores:
            raise PruneError(f"the scores have no {name!r}: it was made by another method or for another network")
        return scores[name]


class RankingMethod(Method):
    """A paper that gives every channel an importance. The least important channels go first.

    Of equal channels the smaller index goes first. If all channels of a group are equal, the seed decides. Subclasses
    write ``score``, and ``importance`` unless the scores have the names of the groups; targets, ratios, counts, floors,
    rounding and global ranking come with ``select``.

    Example:
        >>> class Position(dp.RankingMethod):  # the last channels go first
        ...     paper = "a control"
        ...     def score(self, context):
        ...         return {g.name: -torch.arange(g.width, dtype=torch.float64) for g in context.graph.free}
        >>> scores = dp.score(model, graph, Position(Position.Options()))
        >>> dp.select(scores, graph, keep_ratio=0.5).kept("conv1") == list(range(32))
        True
    """

    Options = RankingOptions

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """The importance of every channel. Pure.

        Args:
            scores: what ``score`` returned.
            graph: after ``prunable``.

        Returns:
            Name of each free group -> (C,) float64, finite. Small values go first. The default takes the scores of the
            groups' names.

        Raises:
            PruneError: a score is missing.
        """
        return {group.name: self.require_score(scores, group.name) for group in graph.free}

    def orders(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> dict[str, list[int]]:
        return orders_of(self.importance(scores, graph), request.seed)

    def warnings(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> list[str]:
        """Name the groups whose channels all have the same importance."""
        return tie_warnings(self.importance(scores, graph))

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        graph = self.prunable(graph)
        importance = self.importance(scores, graph)
        if request.depth:
            if missing := [block.path for block in graph.free_blocks if block.key not in scores]:
                raise PruneError(
                    f"select.depth: these scores say nothing of the block {missing[0]!r}. How much blocks change what "
                    "they read is measured while channels are scored: score it with images, on a graph that was traced "
                    "with depth"
                )
            importance |= {block.key: scores[block.key] for block in graph.free_blocks}
        return Plan.from_kept(graph, select_by_score(graph, importance, request, self.options.normalise))

    def sum_over_layers(self, scores: Mapping[str, Tensor], graph: DependencyGraph, state: str) -> dict[str, Tensor]:
        """Importance of groups whose layers hold changes of one loss, which add up.

        Args:
            scores: ``<producer>:<state>``, (C,) each, for every producer of every free group.
            graph: after ``prunable``.
            state: the part of the names after the colon.

        Returns:
            Free group -> (C,) sum over its producers.

        Raises:
            PruneError: a score is missing.
        """
        layers = {g.name: [self.require_score(scores, f"{name}:{state}") for name in g.producers] for g in graph.free}
        return {name: torch.stack(values).sum(0) for name, values in layers.items()}


class WeightRanking(RankingMethod):
    """A paper that ranks filters by their own weights: one function of the filters of a layer.

    The scores of the layers of a coupled group become one importance by the option ``combine``.
    """

    units = True
    needs = WEIGHTS_ALONE
    Options = CoupledOptions

    @abstractmethod
    def filter_scores(self, filters: Tensor) -> Tensor:
        """Score the filters of one layer. Pure.

        Args:
            filters: (C, D) float64 on the CPU, one flattened filter per row, without bias.

        Returns:
            (C,) float64; small values go first.
        """

    def score(self, context: ScoringContext) -> Scores:
        """Score the weights of every producer; no calibration image is read.

        Returns:
            ``<producer>``: (C,) float64.
        """
        return {
            point.name: self.filter_scores(context.weight(point).double().flatten(1)) for point in context.hook_points
        }

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        layers = {group.name: [self.require_score(scores, name) for name in group.producers] for group in graph.free}
        return {name: reduce_group(values, self.options.combine) for name, values in layers.items()}


def is_ranking(method: Method) -> bool:
    """Whether a method gives every channel an importance and selects by it, so that a search may choose the ratios."""
    return isinstance(method, RankingMethod) and type(method).select is RankingMethod.select
