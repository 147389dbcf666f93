"""Interpretable ranking: filters of a layer go one after another, the one first that the others tell most about.

Interpretable deep model pruning, Neurocomputing 647 (2025) 130485. Layers are ranked independently of one another, on
the unpruned network; a plan keeps the last channels of each order.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.activations import (
    ActivationCensus,
    Activations,
    distinct,
    group_inputs,
    group_outputs,
    memory_batches,
)
from dist_prune.pruning.hooks.consumers import ChannelPoint
from dist_prune.pruning.information.backward_elimination import Elimination
from dist_prune.pruning.information.bandwidth import BandwidthGrid
from dist_prune.pruning.information.estimators import Criterion
from dist_prune.pruning.information.group_orders import EliminationScheduler
from dist_prune.pruning.information.group_samples import ALIGNED, EstimatorConfig, GroupSamples, Width, batches_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share, first_true, top_k

Edge = Annotated[float, Field(ge=-(10**9), le=10**9)]
Quirk = Literal["softmax_labels", "wider_kernel", "top_bin", "last_batch", "conv_sign", "augmented"]
SATURATED = 0.98
STEPS = 400  # of the search for a ratio

# the released program's names: what they stand for here
SAMPLINGS: dict[str, dict[str, Any]] = {
    "bin": {"criterion": "mi_rest", "estimator": "binning"},
    "bin_tot": {"criterion": "joint", "estimator": "binning"},
    "reyei_uns": {"criterion": "mi_rest", "alpha": 1.01, "width": "aligned"},
    "reyei_uns_tot": {"criterion": "mi_all", "alpha": 1.01, "width": "aligned"},
    "reyei_sampling": {"criterion": "mi_rest", "alpha": 1.01, "width": "aligned_label"},
    "renyi": {"criterion": "mi_rest", "alpha": 1.01, "width": "common_label"},
    "p_reyei": {"criterion": "mi_rest", "alpha": 2.0, "width": "polynomial"},
    "renyi_wick": {"criterion": "mi_rest", "alpha": 1.0, "width": "aligned"},
    "renyi_IZY": {"criterion": "relevance", "alpha": 1.01, "width": "label"},
    "renyi_Hz": {"criterion": "entropy", "alpha": 1.01, "width": "all"},
}
PAPER = "reyei_uns"
STANDS = ("criterion", "estimator", "alpha", "width")  # the keys that a sampling decides
DEPRECATED = ("reyei_sampling", "renyi", "p_reyei")
REFUSED = {
    "smoothed": "smoothed differential entropy after a principal component analysis",
    "low_dim": "low-rank Renyi entropy",
    "SMI": "sliced mutual information",
}


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """``sampling`` is the released program's one word for criterion, estimator, alpha and width."""

    sampling: str | None = Field(
        default=None,
        description="bin, reyei_uns, renyi_IZY ...: the released program's name for criterion, estimator, alpha and "
        "width, which are refused where they differ; as_released without one: reyei_uns, the paper's",
    )
    criterion: Criterion = Field(default="mi_rest", description="mi_rest is the paper's; joint loses least")
    estimator: Literal["renyi", "binning"] = Field(default="renyi", description="binning is for tanh layers")
    alpha: float = Field(
        default=1.01, gt=0, le=1000, description="order of the entropy; 1 is Shannon's, 2 needs no spectra"
    )
    width: Width = Field(default="entropy_target", description="how kernel widths are found; aligned: the paper's")
    entropy_target: float = Field(default=0.75, gt=0, lt=1, description="entropy of a whole layer, of log2 batch")
    sigma_combine: Literal["smooth", "median"] = Field(default="smooth", description="aligned widths over batches")
    grid: Literal["fine", "coarse"] = Field(default="fine", description="alignment: 300 widths, or twice 16")
    batch: int = Field(default=100, ge=2, le=65536, description="images whose entropies are taken together")
    by_layer: dict[str, Literal["renyi", "binning"]] = Field(default={}, description="group's glob -> estimator")
    bins: int = Field(default=30, ge=2, le=65536, description="equally spaced edges of the bins")
    bin_range: tuple[Edge, Edge] = Field(default=(-1.0, 1.0), description="first and last edge")
    sigma_y: float = Field(default=0.1, gt=0, le=10**9, description="width of the label kernel")
    skip_zero: float | None = Field(
        default=0.99, ge=0, le=1, description="filters with a larger share of zeros go first"
    )
    combine: Literal["rank", "sum"] = Field(default="rank", description="how the outputs of a residual stream agree")
    rev: bool = Field(default=False, description="delete the smallest score first (ablation)")
    chunk: float = Field(
        default=0, ge=0, lt=1, description="share of what remains that goes in one step; 0: one filter"
    )
    taps: Literal["consumed", "output"] = Field(
        default="consumed", description="behind norm and activation, as the next layer reads a filter; or before them"
    )
    map_side: int | None = Field(default=None, ge=1, le=16384, description="average larger maps to this side first")
    parallel: Literal["layers", "batches", "candidates"] = Field(
        default="layers", description="what is dealt over ranks; moves no score"
    )
    precision: Literal["float64", "float32"] = Field(default="float64", description="of kernels and spectra")
    distribution: Literal["uniform", "l1"] = base.select_only(
        "uniform", description="a target's counts: alike in all groups, or in all but the stem's (as the program's L1)"
    )
    memory_mb: int = Field(default=4096, ge=16, le=10**9, description="for activations held at a time; moves no score")

    @model_validator(mode="after")
    def _edges(self):
        if self.bin_range[0] >= self.bin_range[1]:
            raise ValueError(f"bin_range must rise, got {list(self.bin_range)}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _stood_for(cls, given: Any) -> Any:
        """Write what ``sampling`` (or as_released, the paper's) stands for into the four keys, or refuse another value.

        A resolved recipe has all keys; written out, it says the same when it is read again.
        """
        if not isinstance(given, dict):
            return given
        name, released = given.get("sampling"), given.get("fidelity") == "as_released"
        if name in REFUSED:
            raise ValueError(
                f"sampling {name} ({REFUSED[name]}) is named in the released program's help, but no working code of it "
                "was released; choose one of " + ", ".join(SAMPLINGS)
            )
        if name is not None and name not in SAMPLINGS:
            raise ValueError(f"unknown sampling {name}; there are {', '.join(SAMPLINGS)}")
        if name in DEPRECATED and not released:
            raise ValueError(f"sampling {name} is deprecated by its authors; it needs fidelity as_released")
        if name is None and not released:
            return given
        meant = expand_sampling(name or PAPER, {key: cls.model_fields[key].default for key in STANDS})
        others = [key for key in STANDS if given.get(key, meant[key]) != meant[key]]
        if others:
            what = f"sampling {name}" if name is not None else "fidelity as_released is the paper's estimator, which"
            shown = ", ".join(f"{key} {meant[key]}" for key in STANDS)
            found = " and ".join(f"method.{key}={given[key]}" for key in others)
            back = " ".join(f"method.{key}=null" for key in others)
            more = "" if name is not None else "; another estimator of the released program: method.sampling"
            raise ValueError(
                f"{what} stands for {shown}: {found} of the recipe {'stands' if len(others) == 1 else 'stand'} in the "
                f"way; leave out what differs ({back}){more}"
            )
        return {**given, **meant}

    @model_validator(mode="after")
    def _known(self):
        resolved = self.resolved()
        criterion, width = resolved["criterion"], resolved["width"]
        kernels = "renyi" in (resolved["estimator"], *self.by_layer.values())
        if width in ("aligned", "aligned_label", "polynomial") and criterion == "cmi_label":
            raise ValueError("cmi_label needs kernels that are products over filters: any width but aligned")
        if width == "polynomial" and criterion == "relevance" and kernels:
            raise ValueError("relevance needs a label kernel, and width polynomial has none; take another width")
        if criterion == "mi_all" and kernels and "aligned" not in width:
            raise ValueError("mi_all is I(Z_R; Z_rest): it needs width aligned, or the estimator binning in all layers")
        if self.bin_range[0] >= self.bin_range[1]:
            raise ValueError(f"bin_range goes from a smaller to a larger number, got {list(self.bin_range)}")
        return self

    def resolved(self) -> dict[str, Any]:
        """Criterion, estimator, alpha and width."""
        return {key: getattr(self, key) for key in STANDS}


class Entropy(base.RankingMethod):
    """Backward elimination by matrix-based Renyi entropies; the number of filters kept comes from the request."""

    paper = "Interpretable deep model pruning, Neurocomputing 647 (2025) 130485"
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Per group: ``<group>:order`` (K,) int64, first deleted first; ``:score`` (K,) float64, the criterion in bits
        at each deletion; ``:joint`` (K,) float64, S(R) before it (0 where a static order takes none); ``:alone`` (K,)
        float64, H of each filter, mean over taps; ``:samples`` (1,) int64, images that an entropy is taken over: those
        of a batch, for bins those of all batches."""
        view = {"augment": True} if self.has("augmented") else {}
        found_at = group_outputs if self.options.taps == "output" else group_inputs
        taps = {group.name: found_at(context.graph, group) for group in context.graph.free}
        points = {tap.point.name: tap.point for found in taps.values() for tap in found}
        census = context.collect(list(points.values()), ActivationCensus(), **view)
        shapes = {name: tuple(tables["shape"].tolist()) for name, tables in census.items()}
        statistic = Activations(shapes, self.options.map_side)
        batches, scores = batches_of(context.images, self.options.batch, context.generator("entropy", "batches")), {}
        for names in memory_batches(taps, statistic, context.images, len(batches[0]), self.options.memory_mb):
            held = {tap.point.name: tap.point for name in names for tap in taps[name]}
            maps = {s: t["maps"] for s, t in context.collect(list(held.values()), statistic, **view).items()}
            subjects, dead = [], []
            for name in names:
                chosen = [taps[name][i] for i in distinct([maps[tap.point.name] for tap in taps[name]])]
                found = [tap.take(maps[tap.point.name]) for tap in chosen]
                spec = self.estimator(name)
                subjects.append(GroupSamples(name, found, context.labels, batches, spec, context.device))
                dead.append(self._dead(chosen, census))
            ranking = EliminationScheduler(
                context.map_jobs, context.checkpoint, partial(self.rule, context.graph), self.options.parallel
            )
            for subject, ranked in zip(subjects, ranking.orders(subjects, dead), strict=True):
                state = ranked.state
                scores[f"{subject.name}:order"] = torch.tensor(state.order)
                scores[f"{subject.name}:score"] = torch.tensor(state.scores, dtype=torch.float64)
                scores[f"{subject.name}:joint"] = torch.tensor(state.joints, dtype=torch.float64)
                scores[f"{subject.name}:alone"] = ranked.alone
                binned = subject.estimator.binning
                scores[f"{subject.name}:samples"] = torch.tensor([sum(map(len, batches)) if binned else subject.n])
        return scores

    def estimator(self, group: str) -> EstimatorConfig:
        """How the entropies of a group are estimated."""
        options, spec = self.options, self.options.resolved()
        own = next((kind for glob, kind in options.by_layer.items() if fnmatchcase(group, glob)), spec["estimator"])
        wick = options.sampling == "renyi_wick"
        grid = BandwidthGrid(0.1, 75, 50, 40) if wick else BandwidthGrid()
        wider = self.has("wider_kernel") and not wick
        width = spec["width"]
        return EstimatorConfig(
            criterion=spec["criterion"], binning=own == "binning", alpha=spec["alpha"], width=width,
            target=options.entropy_target, grid=grid._replace(coarse=options.grid == "coarse"),
            halved=width not in ALIGNED or wider, reference_halved=not wick, sigma_y=options.sigma_y,
            softmax=self.has("softmax_labels"),
            last_only=wick and self.has("last_batch"), edges=options.bins, low=options.bin_range[0],
            high=options.bin_range[1], wrapped=self.has("top_bin"), order_free=options.sigma_combine == "median",
            dtype=getattr(torch, options.precision),
        )  # fmt: skip

    def rule(self, graph: DependencyGraph, samples: GroupSamples) -> Elimination:
        """The rule of deletion in a group."""
        options, spec = self.options, self.options.resolved()
        minus = options.sampling == "renyi" and self.has("conv_sign") and graph.layers[samples.name].kind == "conv"
        exhaustive = spec["alpha"] in (2, 3, 4) or samples.estimator.binning
        return Elimination(options.combine, options.rev != minus, options.chunk, exhaustive)

    def _dead(self, taps: Sequence[ChannelPoint], census: Mapping[str, Mapping[str, Tensor]]) -> list[int]:
        """Channels that are zero almost everywhere, in index order; at least one channel is not counted among them."""
        if self.options.skip_zero is None:
            return []
        zeros = sum(census[tap.point.name]["zeros"][tap.positions].sum(1) for tap in taps)
        whole = sum(int(census[tap.point.name]["numbers"]) * tap.positions.shape[1] for tap in taps)
        assert isinstance(zeros, Tensor)
        return [k for k, count in enumerate(zeros.tolist()) if count > self.options.skip_zero * whole][: len(zeros) - 1]

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        self.check(graph, request)
        if self.options.distribution == "l1" and request.target is not None:
            places = self.importance(scores, graph)
            return Plan.keeping(graph, top_k(graph, places, l1_counts(graph, request), request.seed))
        return super().select(scores, graph, request)

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """Where each channel stands in the order of deletion, from 1."""
        return {
            group.name: rank_in_order(self.require_score(scores, f"{group.name}:order").tolist())
            for group in graph.free
        }

    def warnings(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> list[str]:
        shares = {}
        for group in graph.free:
            n = int(self.require_score(scores, f"{group.name}:samples"))
            shares[group.name] = float(self.require_score(scores, f"{group.name}:joint").max()) / math.log2(n)
        high = {name: share for name, share in shares.items() if share > SATURATED}
        if not high:
            return []
        binned = {name: share for name, share in high.items() if self.estimator(name).binning}
        kernels = {name: share for name, share in high.items() if name not in binned}
        wider = "method.width=entropy_target (or a smaller method.entropy_target), or a larger method.batch"
        out = []
        for found, what, mend in (
            (kernels, "kernels", wider),
            (binned, "bins", "fewer method.bins, or more score.images"),
        ):
            names = ", ".join(list(found)[:3]) + (" ..." if len(found) > 3 else "")
            if found:
                out.append(
                    f"in {len(found)} of {len(shares)} groups the entropy of what is left reaches "
                    f"{max(found.values()):.1%} of log2 n ({names}): the {what} tell all samples apart whatever is "
                    f"deleted, and the order follows single entropies. Take {mend}."
                )
        return out


def expand_sampling(sampling: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Criterion, estimator, alpha and width of a released program's name."""
    return {**defaults, "estimator": "renyi", **SAMPLINGS[sampling]}


def l1_counts(graph: DependencyGraph, request: SelectionRequest) -> dict[str, int]:
    """ceil(K (1 - r)) channels of every free group but the stem's, with the smallest r of a grid of 1/400 that meets
    the target (section 7); a residual stream that the stem writes to stays whole with it."""
    assert request.target is not None
    (quantity, share), stem = request.target, next(n for n, layer in graph.layers.items() if layer.kind == "conv")
    cut = [group for group in graph.free if stem not in group.producers]

    def counts(step: int) -> dict[str, int]:
        kept = {group.name: group.width for group in graph.free}
        return kept | {g.name: request.width(g, math.ceil(g.width * (STEPS - step) / STEPS)) for g in cut}

    found = counts(first_true(lambda step: cost_share(graph, quantity, counts(step)) <= share, STEPS))
    low = cost_share(graph, quantity, found)
    if low > share:
        raise PruneError(
            f"target.{quantity}: {share} cannot be reached with method.distribution=l1, which leaves the stem's group "
            f"whole: at least {low:.4f} stays. Raise the target, or take method.distribution=uniform."
        )
    return found


def rank_in_order(order: Sequence[int]) -> Tensor:
    """(K,) float64: where in a deletion order each channel stands."""
    out = torch.zeros(len(order), dtype=torch.float64)
    out[torch.tensor(list(order))] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return out
