"""The recipe sections on training and evaluation: Training, Evaluate."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dist_prune.config.earlier_versions import OLD_NAMES
from dist_prune.config.section import BATCH, LONG, MANY, Section


class Training(Section):
    """The keys of one training run; dense training (``train``) and finetuning (``finetune``) share them."""

    epochs: int = Field(
        default=0, ge=0, le=LONG, description="number of passes over the training images; 0: no training"
    )
    batch: int = Field(
        default=128, ge=1, le=LONG, description="global batch size, independent of the number of processes"
    )
    images: int | None = Field(
        default=None, ge=1, le=MANY, description="number of training images, from the first; default: all"
    )
    optimizer: str = Field(
        default="sgd", max_length=100, description="timm's name of the optimizer; sgd follows the nesterov key"
    )
    optimizer_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")
    lr: float = Field(default=0.1, gt=0, le=10**6, description="learning rate before any decay")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of the optimizer")
    nesterov: bool = Field(default=False, description="Nesterov's form of the momentum, for sgd")
    weight_decay: float = Field(default=5e-4, ge=0, le=1000, description="weight decay of the optimizer")
    decay_norm_bias: bool = Field(
        default=False, description="weight decay also on normalisation layers and biases, as in the papers' SGD"
    )
    schedule: Literal["constant", "step", "multistep", "cosine", "linear", "onecycle"] = Field(
        default="cosine", description="schedule of the learning rate"
    )
    step_size: int = Field(default=30, ge=1, le=LONG, description="step: number of epochs between two decays")
    milestones: tuple[Annotated[int, Field(ge=0, le=LONG)], ...] = Field(
        default=(), description="multistep: epochs at which the learning rate decays"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="step, multistep: factor of each decay")
    min_lr: float = Field(default=0, ge=0, le=10**6, description="cosine, linear, onecycle: learning rate at the end")
    warmup_epochs: float = Field(
        default=0, ge=0, le=LONG, description="number of epochs of the warm-up from warmup_lr to lr"
    )
    warmup_lr: float = Field(default=1e-5, ge=0, le=10**6, description="learning rate at the start of the warm-up")
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="learning rate of each layer, as a share of that of the next layer; default: the same for all",
    )
    lr_scales: dict[str, Annotated[float, Field(ge=0, le=10**6)]] = Field(
        default_factory=dict,
        description="glob of parameter names -> factor of their learning rate; the first match counts",
    )
    label_smoothing: float = Field(default=0, ge=0, lt=1, description="label smoothing of the loss")
    mixup: float = Field(default=0, ge=0, le=1000, description="alpha of mixup; 0: off")
    cutmix: float = Field(default=0, ge=0, le=1000, description="alpha of CutMix; 0: off")
    mix_prob: float = Field(default=1, ge=0, le=1, description="share of the batches that mixup or CutMix mixes")
    distill: float = Field(
        default=0,
        ge=0,
        le=1,
        description="finetune: weight of the distillation loss towards the dense network's outputs (bf16 on GPUs); 0: "
        "off",
    )
    distill_temperature: float = Field(default=4, gt=0, le=1000, description="temperature of the distillation")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of the averaged weights, which are evaluated instead of the raw ones; default: no averaging",
    )
    clip_grad: float | None = Field(
        default=None, gt=0, le=MANY, description="largest norm of the gradient; default: no clipping"
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        le=LONG,
        description="number of forward passes per update, each of at least two images; batch stays the global batch "
        "size of the update",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="number format of the forward pass")
    sparsity: Literal["none", "bn_scale", "group_norm"] = Field(
        default="none",
        description="sparsity term that shrinks channels during training: on the scales of batch norms (bn_scale, "
        "network "
        "slimming) or on all weights of a channel (group_norm, DepGraph's sparse learning)",
    )
    sparsity_weight: float = Field(
        default=1e-4,
        gt=0,
        le=1000,
        description="weight of the sparsity term added to the gradients; network slimming: 1e-4 for VGG, 1e-5 for "
        "ResNet",
    )
    channels_last: bool = Field(default=False, description="NHWC memory order of weights and images")
    compile: bool | Literal["reduce-overhead", "max-autotune"] = Field(
        default=False,
        description="compilation of the network by torch.compile (the first steps take minutes); reduce-overhead: with "
        "CUDA graphs, for small networks on GPUs; max-autotune: with kernels chosen by timing",
    )
    sync_bn: bool = Field(default=False, description="batch-norm statistics over the batches of all ranks (GPUs)")
    freeze_bn: bool = Field(
        default=False,
        description="batch norms that keep their running statistics and use them in training too; for networks whose "
        "batch norms are folded, and for small batches",
    )
    recalibrate_bn: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="finetune: number of training images from which batch-norm statistics are recomputed before it, "
        "drawn "
        "as by score.balance; 0: none",
    )
    selection: Literal["holdout", "last", "test"] = Field(
        default="holdout",
        description="epoch that is kept: the best on held-out training images (holdout), the last, or the best on "
        "test images (test)",
    )
    holdout: float = Field(default=0.1, gt=0, lt=0.9, description="share of the training images held out for selection")
    patience: int | None = Field(
        default=None,
        ge=1,
        le=LONG,
        description="number of evaluations without an improvement after which training stops; default: it does not "
        "stop early",
    )
    only_if_drop: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="finetune: loss of the task's primary figure by pruning, in its unit or in points, up to which "
        "finetuning is skipped; default: never skipped",
    )
    evaluate_every: int = Field(default=1, ge=1, le=LONG, description="number of epochs between two evaluations")
    save_every_steps: int | None = Field(
        default=None,
        ge=1,
        le=MANY,
        description="number of steps between two checkpoints within an epoch; default: none by steps",
    )
    checkpoint_every_minutes: float = Field(
        default=10, gt=0, le=LONG, description="number of minutes between two checkpoints within an epoch"
    )
    keep_checkpoints: int = Field(default=2, ge=1, le=LONG, description="number of newest checkpoints that are kept")

    def __repr_args__(self):
        """Write keys under their old names: a stopped training's checkpoints are found by a digest of this text."""
        for name, value in super().__repr_args__():
            yield OLD_NAMES.get(f"train.{name}", f"train.{name}").removeprefix("train."), value

    @model_validator(mode="after")
    def _check_nesterov(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    @model_validator(mode="after")
    def _check_warmup(self):
        """Refuse a warm-up that is longer than the training, which would never reach lr."""
        cycle = self.schedule == "onecycle"  # its learning rate has to fall as well
        if 0 < self.epochs < self.warmup_epochs or (cycle and 0 < self.epochs == self.warmup_epochs):
            raise ValueError(
                f"schedule {self.schedule} climbs to lr for warmup_epochs ({self.warmup_epochs:g}) and uses the "
                f"rest of "
                f"the {self.epochs} epochs, so warmup_epochs has to be smaller "
                f"({'0: three tenths of them' if cycle else '0: no warm-up'})"
            )
        return self

    skip_nonfinite: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="number of updates with a loss that is not finite that are skipped, in all epochs, before the run "
        "ends",
    )


class Evaluate(Section):
    """Evaluation of a network."""

    batch: int = Field(
        default=250,
        ge=1,
        le=BATCH,
        description="number of images in one forward pass of an evaluation",
    )
