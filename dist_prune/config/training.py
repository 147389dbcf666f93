"""The sections of a recipe that say how a network is trained and evaluated: Training, Evaluate."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dist_prune.config.compatibility import OLD_NAMES
from dist_prune.config.section import BATCH, LONG, MANY, Section


class Training(Section):
    """One training run: dense training and finetuning share it."""

    epochs: int = Field(default=0, ge=0, le=LONG, description="passes over the training images; 0: no training")
    batch: int = Field(default=128, ge=1, le=LONG, description="global batch, whatever the number of processes")
    images: int | None = Field(default=None, ge=1, le=MANY, description="train on the first N images only (studies)")
    optimizer: str = Field(default="sgd", max_length=100, description="timm's name; sgd follows the nesterov key")
    optimizer_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")
    lr: float = Field(default=0.1, gt=0, le=10**6, description="learning rate before any decay")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0, le=1000)
    decay_norm_bias: bool = Field(default=False, description="weight decay on norms and biases too (papers' SGD)")
    schedule: Literal["constant", "step", "multistep", "cosine", "linear", "onecycle"] = "cosine"
    step_size: int = Field(default=30, ge=1, le=LONG, description="step: epochs between two decays")
    milestones: tuple[Annotated[int, Field(ge=0, le=LONG)], ...] = Field(
        default=(), description="multistep: epochs at which the rate decays"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="step and multistep: the factor of a decay")
    min_lr: float = Field(default=0, ge=0, le=10**6, description="learning rate at the end of cosine, linear, onecycle")
    warmup_epochs: float = Field(default=0, ge=0, le=LONG, description="epochs from warmup_lr up to lr")
    warmup_lr: float = Field(default=1e-5, ge=0, le=10**6, description="learning rate at the start of the warm-up")
    layer_decay: float | None = Field(
        default=None, gt=0, le=1, description="learning rate of each earlier layer, as a share of the next one's"
    )
    lr_scales: dict[str, Annotated[float, Field(ge=0, le=10**6)]] = Field(
        default_factory=dict, description="glob of parameter names: factor of their learning rate, the first that fits"
    )
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    mixup: float = Field(default=0, ge=0, le=1000, description="alpha; 0 is off")
    cutmix: float = Field(default=0, ge=0, le=1000, description="alpha; 0 is off")
    mix_prob: float = Field(default=1, ge=0, le=1, description="share of the batches that are mixed")
    distill: float = Field(
        default=0, ge=0, le=1, description="finetune: weight of the dense network's soft labels (bf16 on GPUs)"
    )
    distill_temperature: float = Field(default=4, gt=0, le=1000)
    ema: float | None = Field(default=None, gt=0, lt=1, description="decay of the averaged weights that are evaluated")
    clip_grad: float | None = Field(default=None, gt=0, le=MANY, description="largest norm of the gradient")
    accumulate: int = Field(
        default=1, ge=1, le=LONG,
        description="forward passes per update, of two images at least; the batch stays the global batch",
    )  # fmt: skip
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sparsity: Literal["none", "bn_scale", "group_norm"] = Field(
        default="none",
        description="make channels small while training: the batch norms' scales (network slimming), or all weights of "
        "a channel (DepGraph's sparse learning)",
    )
    sparsity_weight: float = Field(
        default=1e-4,
        gt=0,
        le=1000,
        description="of the term that sparsity adds to gradients; slimming: 1e-4 VGG, 1e-5 ResNet",
    )
    channels_last: bool = Field(default=False, description="weights and images in NHWC memory order")
    compile: bool | Literal["reduce-overhead", "max-autotune"] = Field(
        default=False,
        description="torch.compile the network (the first steps take minutes); reduce-overhead: by CUDA graphs, for "
        "small networks on GPUs",
    )
    sync_bn: bool = Field(default=False, description="batch norms see the batches of all ranks (GPUs)")
    recalibrate_bn: int = Field(
        default=0, ge=0, le=MANY,
        description="finetune: new batch-norm statistics first, from so many of its images (see score.balance)",
    )  # fmt: skip
    selection: Literal["holdout", "last", "test"] = Field(
        default="holdout",
        description="which epoch is kept: the best on held-out training images, the last, the best on test",
    )
    holdout: float = Field(default=0.1, gt=0, lt=0.9, description="share of the training images held out for selection")
    patience: int | None = Field(
        default=None, ge=1, le=LONG, description="stop after so many evaluations without a better one"
    )
    only_if_drop: float | None = Field(
        default=None, ge=0, le=100, description="finetune: only where cutting cost more than so many points of top-1"
    )
    evaluate_every: int = Field(default=1, ge=1, le=LONG, description="epochs between two evaluations")
    save_every_steps: int | None = Field(
        default=None, ge=1, le=MANY, description="checkpoint after so many steps as well"
    )
    checkpoint_every_minutes: float = Field(
        default=10, gt=0, le=LONG, description="checkpoint after so many minutes as well"
    )
    keep_checkpoints: int = Field(default=2, ge=1, le=LONG, description="newest checkpoints that stay")

    def __repr_args__(self):
        """Under the keys' old names: checkpoints of a fit that was stopped are found by a digest of this text."""
        for name, value in super().__repr_args__():
            yield OLD_NAMES.get(f"train.{name}", f"train.{name}").removeprefix("train."), value

    @model_validator(mode="after")
    def _nesterov(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    @model_validator(mode="after")
    def _warmup(self):
        """Every schedule climbs to lr first: a climb that is longer than the training never gets there."""
        cycle = self.schedule == "onecycle"  # it has to fall as well
        if 0 < self.epochs < self.warmup_epochs or (cycle and 0 < self.epochs == self.warmup_epochs):
            raise ValueError(
                f"schedule {self.schedule} climbs to lr for warmup_epochs ({self.warmup_epochs:g}) and has the rest of "
                f"the {self.epochs} epochs for itself, so warmup_epochs has to be smaller "
                f"({'0: three tenths of them' if cycle else '0: no warm-up'})"
            )
        return self

    skip_nonfinite: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="updates with a loss that is not finite to skip, in all epochs, before stopping",
    )


class Evaluate(Section):
    batch: int = Field(default=250, ge=1, le=BATCH, description="images per step of an evaluation")
