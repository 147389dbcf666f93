"""Options of Dirichlet switches."""

from typing import Literal

from pydantic import Field, model_validator

from dist_prune.methods import base
from dist_prune.pruning.hooks.gating import Where

Quirk = Literal["batch_statistics", "mixed_images", "dropout", "kl_at_mean", "reversed_ranking"]


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """Keys of ``method`` in a recipe of Dirichlet switches.

    Switches train on the calibration images (``score.images: all`` for the papers' whole training set), with the
    recipe's training augmentation. The released networks have ``kl_weight=0``, ``scale=simplex`` and ``place=output``
    (ResNet-56: consumed).
    """

    released = ("batch_statistics", "mixed_images", "dropout")

    variant: Literal["point", "integral"] = Field(
        default="point", description="value of the switches in the loss: the posterior's mean, or draws from it"
    )
    posterior: Literal["dirichlet", "logistic_normal"] = Field(
        default="dirichlet",
        description="family of the posterior; in a logistic_normal channels can rise together, it needs "
        "variant=integral",
    )
    place: Where = Field(
        default="consumed", description="tensors that are multiplied: inputs of the next layers, or raw outputs"
    )
    scale: Literal["width", "simplex"] = Field(
        default="width", description="factors of the channels: s times the number of channels (mean 1), or s itself"
    )
    jointly: bool = Field(default=False, description="training of all groups at once instead of one at a time")
    prior: float = Field(default=2.0, gt=0, le=10**6, description="alpha of the symmetric prior")
    start: float | None = Field(
        default=None,
        ge=-1000,
        le=1000,
        description="first value of every parameter v, with phi = softplus(v); null: the prior's",
    )
    rank: int = Field(
        default=4, ge=1, le=65536, description="logistic_normal: rank of the covariance beside its diagonal"
    )
    draws: int = Field(
        default=5, ge=1, le=65536, description="integral: number of draws per step, shared by the images of a batch"
    )
    average: Literal["logits", "losses"] = Field(default="logits", description="integral: quantity averaged over draws")
    kl_weight: float = Field(default=1.0, ge=0, le=10**6, description="weight of the divergence from the prior")
    kl_scale: Literal["images", "batch"] = Field(
        default="images", description="divisor of the divergence: number of images, or of those in a batch"
    )
    kl_epochs: int = Field(
        default=0, ge=0, le=10**6, description="epochs over which the divergence's weight rises linearly; 0: none"
    )
    epochs: int = Field(default=1, ge=1, le=10**6, description="epochs of the switches' training")
    batch: int = Field(default=100, ge=1, le=65536, description="images per update, over all ranks")
    optimizer: Literal["sgd", "adam"] = Field(default="sgd", description="optimizer of the switches")
    lr: float = Field(default=0.1, gt=0, le=10**6, description="learning rate of the switches")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(
        default=0.0, ge=0, le=1000, description="weight decay of the switches' parameters (ResNet-56's program: 1e-4)"
    )

    @model_validator(mode="after")
    def _check_posterior(self):
        if self.posterior == "logistic_normal" and self.variant == "point":
            raise ValueError("a logistic normal's covariance is only seen by draws: set variant to integral")
        return self
