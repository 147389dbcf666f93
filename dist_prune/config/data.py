"""The sections of a recipe that say which network and which images: Backbone, Data."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dist_prune.config.section import LONG, PathText, Section
from dist_prune.config.stage_keys import Augmentation, External, InputShape, Loading, Network, Operational, ReadBy

SIDE = 16384  # pixels of an image's side


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the first number must not be larger than the second, got {list(value)}")
    return value


Edge = Annotated[float, Field(gt=0, le=1000)]
Span = Annotated[tuple[Edge, Edge], AfterValidator(_rising)]


class Backbone(Section):
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


class Data(Section):
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
