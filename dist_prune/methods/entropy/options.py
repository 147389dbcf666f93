"""Options of entropy ranking, and the released program's names for its estimators."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dist_prune.methods import base
from dist_prune.pruning.information.estimators import Criterion
from dist_prune.pruning.information.group_samples import Width

Edge = Annotated[float, Field(ge=-(10**9), le=10**9)]
Quirk = Literal["softmax_labels", "wider_kernel", "top_bin", "last_batch", "conv_sign", "augmented"]

# the released program's names -> the values of the keys that they determine
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
PAPER = "reyei_uns"  # the paper's estimator
DETERMINED = ("criterion", "estimator", "alpha", "width")  # the keys that a sampling determines
DEPRECATED = ("reyei_sampling", "renyi", "p_reyei")  # by their authors
REFUSED = {
    "smoothed": "smoothed differential entropy after a principal component analysis",
    "low_dim": "low-rank Renyi entropy",
    "SMI": "sliced mutual information",
}


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """Keys of ``method`` in a recipe of entropy ranking.

    ``sampling`` is the released program's one name for criterion, estimator, alpha and width.
    """

    sampling: str | None = Field(
        default=None,
        description="the released program's name (bin, reyei_uns, renyi_IZY ...) for criterion, estimator, alpha and "
        "width, whose other values are refused; as_released without a name: reyei_uns, the paper's",
    )
    criterion: Criterion = Field(
        default="mi_rest", description="quantity by which filters are deleted; mi_rest: the paper's, joint: least loss"
    )
    estimator: Literal["renyi", "binning"] = Field(
        default="renyi", description="estimator of the entropies; binning is meant for tanh layers"
    )
    alpha: float = Field(
        default=1.01, gt=0, le=1000, description="order of the entropy; 1 is Shannon's, 2 needs no spectra"
    )
    width: Width = Field(default="entropy_target", description="rule for the kernel widths; aligned: the paper's")
    entropy_target: float = Field(
        default=0.75, gt=0, lt=1, description="entropy_target: entropy of a whole layer, share of log2 batch"
    )
    sigma_combine: Literal["smooth", "median"] = Field(
        default="smooth", description="aligned: reduction of the widths over batches"
    )
    grid: Literal["fine", "coarse"] = Field(
        default="fine", description="aligned: search among 300 widths, or twice among 16"
    )
    batch: int = Field(default=100, ge=2, le=65536, description="images over which an entropy is taken")
    by_layer: dict[str, Literal["renyi", "binning"]] = Field(
        default={}, description="estimator of single groups, by glob"
    )
    bins: int = Field(default=30, ge=2, le=65536, description="binning: number of equally spaced edges")
    bin_range: tuple[Edge, Edge] = Field(default=(-1.0, 1.0), description="binning: first and last edge")
    sigma_y: float = Field(default=0.1, gt=0, le=10**9, description="width sigma of the label kernel")
    skip_zero: float | None = Field(
        default=0.99, ge=0, le=1, description="share of zeros above which filters are deleted first; null: none are"
    )
    combine: Literal["rank", "sum"] = Field(
        default="rank", description="reduction of the scores over the outputs of a residual stream"
    )
    rev: bool = Field(default=False, description="deletion of the smallest score first (ablation)")
    chunk: float = Field(
        default=0, ge=0, lt=1, description="share of the remaining filters deleted in one step; 0: one filter"
    )
    taps: Literal["consumed", "output"] = Field(
        default="consumed",
        description="activations that are read: after norm and activation, as the next layers read them, or before",
    )
    map_side: int | None = Field(
        default=None, ge=1, le=16384, description="side to which larger maps are averaged, in pixels; null: none are"
    )
    parallel: Literal["layers", "batches", "candidates"] = Field(
        default="layers", description="unit of work divided among ranks; changes no score"
    )
    precision: Literal["float64", "float32"] = Field(default="float64", description="arithmetic of kernels and spectra")
    distribution: Literal["uniform", "l1"] = base.select_only(
        "uniform",
        description="channel counts for a target: equal shares in all groups, or in all but the stem's (program's L1)",
    )
    memory_mb: int = Field(
        default=4096, ge=16, le=10**9, description="memory for activations, in MiB; changes no score"
    )

    @model_validator(mode="after")
    def _check_bin_range(self):
        if self.bin_range[0] >= self.bin_range[1]:
            raise ValueError(f"bin_range must rise, got {list(self.bin_range)}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _expand_sampling(cls, values: Any) -> Any:
        """Write the values that ``sampling`` (or as_released: the paper's) determines, or refuse others.

        A resolved recipe has all keys, and has the same meaning when it is read again.
        """
        if not isinstance(values, dict):
            return values
        name = values.get("sampling")
        released = values.get("fidelity") == "as_released"
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
            return values
        determined = expand_sampling(name or PAPER, {key: cls.model_fields[key].default for key in DETERMINED})
        others = [key for key in DETERMINED if values.get(key, determined[key]) != determined[key]]
        if others:
            subject = f"sampling {name}" if name is not None else "fidelity as_released is the paper's estimator, which"
            shown = ", ".join(f"{key} {determined[key]}" for key in DETERMINED)
            conflicts = " and ".join(f"method.{key}={values[key]}" for key in others)
            cure = " ".join(f"method.{key}=null" for key in others)
            hint = "" if name is not None else "; another estimator of the released program: method.sampling"
            verb = "stands" if len(others) == 1 else "stand"
            raise ValueError(
                f"{subject} stands for {shown}: {conflicts} of the recipe {verb} in the way; leave out what "
                f"differs ({cure}){hint}"
            )
        return {**values, **determined}

    @model_validator(mode="after")
    def _check_combination(self):
        resolved = self.resolved()
        criterion, width = resolved["criterion"], resolved["width"]
        kernels = "renyi" in (resolved["estimator"], *self.by_layer.values())
        if width in ("aligned", "aligned_label", "polynomial") and criterion == "cmi_label":
            raise ValueError("cmi_label needs kernels that are products over filters: any width but aligned")
        if width == "polynomial" and criterion == "relevance" and kernels:
            raise ValueError("relevance needs a label kernel, and width polynomial has none; take another width")
        if criterion == "mi_all" and kernels and "aligned" not in width:
            raise ValueError("mi_all is I(Z_R; Z_rest): it needs width aligned, or the estimator binning in all layers")
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the values of criterion, estimator, alpha and width."""
        return {key: getattr(self, key) for key in DETERMINED}


def expand_sampling(sampling: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Expand a released program's name to criterion, estimator, alpha and width.

    Args:
        sampling: a key of ``SAMPLINGS``.
        defaults: the four keys with their defaults, for those that the name leaves open.
    """
    return {**defaults, "estimator": "renyi", **SAMPLINGS[sampling]}
