"""The largest sections of a recipe: network, images, training. recipe.py has the others and the whole."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dist_prune.compatibility import OLD_NAMES
from dist_prune.errors import path_trouble
from dist_prune.stage_keys import Augmentation, External, InputShape, Loading, Network, Operational, ReadBy

MANY = 10**9  # images, steps: more than any run has
BATCH = 65536  # images that go through a network together
LONG = 10**6  # epochs, minutes
SIDE = 16384  # pixels of an image's side


class Part(BaseModel):
    """A section of a recipe: unknown keys are errors, numbers are finite, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the first number must not be larger than the second, got {list(value)}")
    return value


def _path(value: str) -> str:
    if trouble := path_trouble(value):
        raise ValueError(trouble)
    return value


PathText = Annotated[str, AfterValidator(_path)]
Edge = Annotated[float, Field(gt=0, le=1000)]
Span = Annotated[tuple[Edge, Edge], AfterValidator(_rising)]


class Backbone(Part):
    """The network: a timm name (this package's CIFAR networks are in timm's registry too)."""

    name: Network[str] = Field(
        max_length=200, description="timm's name; dist-prune list backbones has this package's networks too"
    )
    checkpoint: External[PathText | None] = Field(
        default=None,
        description="file of weights: the dense network's where train.epochs is 0, else the training starts from them",
    )
    checkpoint_key: Annotated[str, ReadBy(("train",))] = Field(
        default="auto",
        min_length=1,
        max_length=200,
        description="which weights of a file with several: auto (averaged ones where there are some, as timm's loader "
        "does), ema, or an entry's name, for example state_dict",
    )
    checkpoint_skip: Annotated[tuple[str, ...], ReadBy(("train",))] = Field(
        default=(), description="globs of names in the file to leave out (counters and losses always are)"
    )
    pretrained: Network[bool] = Field(
        default=False,
        description="let timm fetch its pretrained weights; train.epochs says of them what it says of a checkpoint",
    )
    kwargs: Network[dict[str, Any]] = Field(
        default_factory=dict, description="further arguments of the network's class: numbers, words, lists of them"
    )

    @model_validator(mode="after")
    def _of_a_file(self):
        for key in ("checkpoint_key", "checkpoint_skip"):
            if not self.checkpoint and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"backbone.{key} chooses within a file: name one with backbone.checkpoint, or leave it out"
                )
        return self


class Data(Part):
    """The data set and how its images reach the network."""

    source: InputShape[Literal["digits", "npz", "cifar10", "cifar100", "mnist", "fashion_mnist", "imagefolder"]]
    root: External[PathText | None] = Field(
        default=None, description="file or folder; ${VARIABLES} of the environment are filled in"
    )
    train_split: Loading[PathText] = Field(
        default="train", description="imagefolder: sub-folder of the training images"
    )
    eval_split: Loading[PathText] = Field(default="val", description="imagefolder: sub-folder of the evaluation images")
    classes: Loading[tuple[Annotated[int, Field(ge=0, le=LONG)], ...] | None] = Field(
        default=None, description="arrays: only the images of these classes, renumbered from 0 in this order"
    )
    class_order: Loading[Literal["text", "natural"] | None] = Field(
        default=None,
        description="image files: how class folders are numbered: text is 0, 1, 10, 2 (torchvision's), natural is 0, "
        "1, 2, 10 (timm's); left out: text, with a warning where weights from elsewhere may mean the other",
    )
    class_map: External[PathText | None] = Field(
        default=None,
        description="image files: a file of class names in the order of their numbers: a name a line, or JSON",
    )
    layout: Loading[Literal["nhwc", "nchw"] | None] = Field(
        default=None, description="npz: the axes of the images; left out: nhwc, and what looks like nchw is refused"
    )
    mean: Loading[tuple[Annotated[float, Field(ge=-1000, le=1000)], ...] | None] = Field(
        default=None, description="per channel, on [0, 1]; default: the model's own"
    )
    std: Loading[tuple[Annotated[float, Field(gt=0, le=1000)], ...] | None] = Field(
        default=None, description="like mean"
    )
    image_size: InputShape[int | None] = Field(
        default=None, ge=1, le=SIDE, description="side of the square input; default: the model's own, of arrays theirs"
    )
    crop: Loading[float | None] = Field(
        default=None, gt=0, le=1, description="share of the resized image that is cropped (crop_pct)"
    )
    interpolation: Loading[Literal["bilinear", "bicubic", "nearest"] | None] = Field(
        default=None, description="default: the model's own"
    )
    crop_mode: Loading[Literal["center", "squash", "border"] | None] = Field(
        default=None, description="image files: cut to a square, squeeze, or pad; default: the model's own"
    )
    exif: Loading[bool] = Field(
        default=True, description="image files: turn photographs upright by their EXIF orientation"
    )
    augment: Augmentation[Literal["none", "crop", "crop_flip", "resized_crop_flip"]] = Field(
        default="none",
        description="training images: crop pads by an eighth and crops, resized_crop_flip is Inception's",
    )
    padding: Augmentation[int | None] = Field(
        default=None, ge=0, le=SIDE, description="crop, crop_flip: pixels of the pad; default: an eighth of the side"
    )
    crop_scale: Augmentation[Span] = Field(
        default=(0.08, 1.0), description="resized_crop_flip: share of the area, from and to"
    )
    crop_ratio: Augmentation[Span] = Field(default=(3 / 4, 4 / 3), description="resized_crop_flip: aspect, from and to")
    auto_augment: Augmentation[str | None] = Field(
        default=None,
        max_length=200,
        description="timm's policy for training images: rand-m9-mstd0.5-inc1, original, augmix-m5-w4 ...",
    )
    random_erasing: Augmentation[float] = Field(
        default=0, ge=0, le=1, description="share of the training images that lose a part"
    )
    random_erasing_mode: Augmentation[Literal["const", "rand", "pixel"]] = Field(
        default="pixel", description="what is there instead: zeros, one normal colour, normal noise"
    )
    resize_schedule: Annotated[
        dict[Annotated[int, Field(ge=0, le=LONG)], Annotated[int, Field(ge=1, le=SIDE)]],
        ReadBy(("train", "finetune", "finetune_between")),
    ] = Field(
        default_factory=dict,
        description="progressive resizing, first epoch to side: {0: 128, 30: 192, 60: 224}; evaluation: image_size",
    )
    backend: Operational[Literal["auto", "torch", "ffcv", "memory"]] = Field(
        default="auto",
        description="who serves the images: ffcv where a matching .beton lies beside the data (for evaluation only one "
        "that keeps the pixels), memory for arrays, else torch",
    )
    workers: Operational[int] = Field(
        default=2, ge=0, le=1024, description="decoding processes per rank (torch and ffcv)"
    )
    on_error: Operational[Literal["fail", "skip"]] = Field(
        default="fail", description="an image that cannot be read ends the run, or is left out and listed in the report"
    )

    @model_validator(mode="after")
    def _of_some_sources(self):
        for key, source, whose in (
            (
                "class_order",
                "imagefolder",
                "folders of images: labels of arrays are numbers already (see data.classes)",
            ),
            ("class_map", "imagefolder", "folders of images: labels of arrays are numbers already (see data.classes)"),
            ("layout", "npz", "the arrays of an .npz file"),
        ):
            if getattr(self, key) is not None and self.source != source:
                raise ValueError(f"data.{key} is for {whose}; data.source is {self.source}. Leave it out")
        if self.class_map and self.class_order:
            raise ValueError("data.class_map says the order of the classes: leave data.class_order out")
        return self

    @model_validator(mode="after")
    def _schedule(self):
        if self.resize_schedule and min(self.resize_schedule) != 0:
            first = min(self.resize_schedule)
            raise ValueError(f"data.resize_schedule must begin at epoch 0, its first epoch is {first}")
        return self


class Training(Part):
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
