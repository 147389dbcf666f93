"""Options of Sensitivity Pruner."""

from typing import Annotated, Literal

from pydantic import Field

from dist_prune.methods import base

Beta = Annotated[float, Field(gt=0, le=10**6)]
Quirk = Literal["raw_logits", "reshape", "small_mask", "fresh_norms", "padding_32"]


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """Keys of ``method`` in a recipe of Sensitivity Pruner; the recipes' headers name the released programs' flags."""

    keep: float = Field(default=0.4, gt=0, le=1, description="share of the filters in the single-shot target")
    sort: Literal["global", "layer"] = Field(
        default="global", description="filters among which the target is chosen: the pool's, or each layer's"
    )
    pool: Literal["prunable", "layers", "kind"] = Field(
        default="prunable",
        description="layers of the pool: prunable ones, every conv and linear layer, or those of the round's kind",
    )
    fallback: Literal["empty", "few"] = Field(
        default="empty",
        description="layers that get a fifth of keep: those with no filter in the target, or those with fewer",
    )
    total: Literal["pool", "layer"] = Field(default="pool", description="sum by which sensitivities are divided")
    redraw_linear: bool = Field(
        default=True, description="new random weights in the linear layers of the scored copy too"
    )
    by: Literal["stage", "layer", "all"] = Field(default="stage", description="groups that are learned in one round")
    rounds: str | None = Field(
        default=None,
        pattern=r"^\d{1,6}(-\d{1,6})?$",
        description="rounds that are learned: 3, or 3-5, counted from 1; null: all",
    )
    skip: tuple[str, ...] = Field(default=(), description="globs of layers whose groups stay whole")
    epochs: int = Field(default=4, ge=1, le=10**6, description="epochs of each round")
    batch: int = Field(default=64, ge=2, le=10**6, description="images per update, over all ranks")
    lr: float = Field(default=1e-3, gt=0, le=10**6, description="learning rate of weights and masks")
    decay_every: int = Field(
        default=2, ge=1, le=10**6, description="epochs between two divisions of the learning rate by 10"
    )
    weight_decay: float = Field(default=5e-4, ge=0, le=1000, description="weight decay of weights and masks")
    holdout: float = Field(
        default=0.1, ge=0, lt=0.9, description="share of the images that choose a round's epoch; 0: the last epoch"
    )
    beta: tuple[Beta, Beta] = Field(default=(1.0, 100.0), description="first and last factor in the masks' sigmoids")
    beta_every: int = Field(default=100, ge=1, le=10**9, description="updates per point of the ramp")
    bump: float = Field(default=1.0, ge=0, le=10**6, description="increase of the factor of an undecided mask")
    bump_epochs: float = Field(default=1.0, ge=0, le=10**6, description="epochs before the first increase")
    bump_points: int | None = Field(
        default=None, ge=0, le=10**9, description="points of the ramp before it instead; null: bump_epochs"
    )
    window: int = Field(default=20, ge=1, le=10**9, description="updates between two decisions of a mask")
    vote: Literal["binary", "mean"] = Field(
        default="binary", description="quantity averaged over a window: decisions, or values"
    )
    init: Literal["wide", "he"] = Field(default="wide", description="initial weights of the mask's convolution")
