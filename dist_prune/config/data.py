"""The recipe sections on the network and the images: Backbone, Data."""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dist_prune import plugins
from dist_prune.config.section import LONG, PathText, Section
from dist_prune.config.stage_keys import Augmentation, External, InputShape, Loading, Network, Operational, ReadBy
from dist_prune.errors import nearest

SIDE = 16384  # pixels of an image's side


def _check_rising(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the first number must not be larger than the second, got {list(value)}")
    return value


# data sets of this package -> what they are; a recipe may also name an entry point or a Dataset's import path
SOURCES = {
    "digits": "scikit-learn's 1,797 digits",
    "npz": "arrays of an .npz file",
    "npz_labels": "arrays of an .npz file with several labels for each image",
    "npz_values": "arrays of an .npz file with numbers for each image",
    "checkpoint": "augmented images in a checkpoint of the interpretable-pruning authors",
    "cifar10": "torchvision's CIFAR10",
    "cifar100": "torchvision's CIFAR100",
    "mnist": "torchvision's MNIST",
    "fashion_mnist": "torchvision's FashionMNIST",
    "svhn": "torchvision's SVHN",
    "imagefolder": "folders of images, one for each class",
    "maskfolder": "images with a mask of class numbers each",
    "boxfolder": "images with boxes in a boxes.json",
    "coco": "images with boxes in annotation files of COCO's form",
    "images": "image files without classes",
    "tar": "tar shards of images",
    "parquet": "parquet files of images, as Hugging Face's datasets write them",
}

IMAGE_FILES = ("imagefolder", "maskfolder", "tar", "parquet")  # sources whose images are files
COPIED = ("imagefolder", "tar", "parquet")  # those that data.stage_to copies
SHARDS = ("tar", "parquet")  # those whose root may be a pattern or a list
_SPLIT_PLACE = re.compile(r"\{split\}|\{[^{}]*,[^{}]*\}")


def shard_splits(entry: str, splits: tuple[str, str]) -> tuple[str, ...]:
    """The splits that an entry of a list of shards belongs to.

    Args:
        entry: a file, a pattern or a folder of ``data.root``.
        splits: names of the two splits.

    Returns:
        Both where the entry has a place for the split's name or is a folder of both; else the one whose name is in the
        entry's last part, or, if none is, in the folder above.

    Raises:
        ValueError: neither name is there, or both are.
    """
    if _SPLIT_PLACE.search(entry):
        return splits
    path = PurePath(entry)
    for text in (path.name, path.parent.name):
        found = [split for split in dict.fromkeys(splits) if split in text]
        found = [split for split in found if not any(split != other and split in other for other in found)]
        if len(found) == 1:
            return tuple(found)
        if found:
            break
    if not path.suffix and not any(mark in entry for mark in "*?["):  # a folder
        return splits
    raise ValueError(
        f"data.root: {entry!r} has {'both' if found else 'neither'} of the splits' names {splits[0]!r} and "
        f"{splits[1]!r} in its name, so which split it is of cannot be told: write {{split}} where the name stands, or "
        "data.train_split and data.eval_split for the parts of the names"
    )


def source_names() -> list[str]:
    """The names of all data sets: those of this package, then those of entry points."""
    return list(dict.fromkeys([*SOURCES, *plugins.names("dataset")]))


def _check_source(value: str) -> str:
    if value in SOURCES or value in plugins.names("dataset"):
        plugins.find("dataset", value, "dist_prune/data/datasets.py" if value in SOURCES else "")
        return value
    if plugins.names_code(value):
        return value
    raise ValueError(
        f"no data set of this name.{nearest(value, source_names())} Allowed: {', '.join(source_names())}, or a "
        "map-style Dataset as package.module:Dataset or ./file.py:Dataset"
    )


Side = Annotated[int, Field(ge=1, le=SIDE)]
Edge = Annotated[float, Field(gt=0, le=1000)]
Span = Annotated[tuple[Edge, Edge], AfterValidator(_check_rising)]


class Backbone(Section):
    """The network, by name: of timm's registry, a folder, torchvision, transformers, or a module of the user's."""

    name: Network[str] = Field(
        max_length=200,
        description="name in timm's registry (dist-prune list backbones), hf-hub:OWNER/NAME, local-dir:FOLDER, "
        "torchvision:NAME, transformers:FOLDER_OR_NAME, features:NAME (timm's network without its head), "
        "package.module:callable or ./file.py:callable (the last two run code)",
    )
    checkpoint: External[PathText | None] = Field(
        default=None,
        description="file of weights: those of the dense network if train.epochs is 0, else the start of its training",
    )
    checkpoint_key: Annotated[str, ReadBy(("train",))] = Field(
        default="auto",
        min_length=1,
        max_length=200,
        description="weights to take from a file with several: auto (averaged ones if there are any, as in timm's "
        "loader), ema, or an entry's name, for example state_dict",
    )
    checkpoint_skip: Annotated[tuple[str, ...], ReadBy(("train",))] = Field(
        default=(), description="globs of names in the file to leave out; counters and losses are always left out"
    )
    bundle: Annotated[PathText | None, ReadBy(("train",))] = Field(
        default=None,
        description="bundle whose pruned network the run starts from instead of a dense one; checkpoint and pretrained "
        "then name the dense network's weights for finetune.distill alone",
    )
    pretrained: Network[bool] = Field(
        default=False,
        description="published weights of the network, fetched by timm, torchvision or transformers; used like "
        "those of backbone.checkpoint",
    )
    kwargs: Network[dict[str, Any]] = Field(
        default_factory=dict, description="further arguments of the network's class: numbers, words, or lists of them"
    )
    protect: Network[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...]] = Field(
        default=(), description="globs of layers whose outputs keep their width"
    )
    streams: Network[bool] = Field(
        default=False,
        description="pruning of residual streams that run through norms over channels (layer, group and "
        "root-mean-square norms) and bare parameters (class tokens, position embeddings, layer scales)",
    )
    units: Network[Literal["earlier", "whole", "head_width"]] = Field(
        default="earlier",
        description="what attention loses: whole heads of ViT, DeiT and Swin as in earlier versions (earlier); whole "
        "heads of every known attention module, and pairs of gated perceptrons (whole); or, of all heads of a layer "
        "alike, positions of queries with keys and of values with outputs (head_width)",
    )

    @model_validator(mode="after")
    def _check_checkpoint_keys(self):
        for key in ("checkpoint_key", "checkpoint_skip"):
            if not self.checkpoint and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"backbone.{key} chooses within a file: name one with backbone.checkpoint, or leave it out"
                )
        return self


class Data(Section):
    """The data set, and how its images are loaded and augmented."""

    source: Annotated[InputShape[str], AfterValidator(_check_source)] = Field(
        max_length=200,
        description="data set: scikit-learn's digits, arrays of an .npz file (npz_labels: with several labels for each "
        "image, npz_values: with numbers), one of torchvision's, folders of images, images with a mask each "
        "(maskfolder), images with boxes (boxfolder, coco), files without classes (images), tar shards or parquet "
        "files of images, or a map-style Dataset: package.module:Dataset, ./file.py:Dataset, or the name of an entry "
        "point; digits, npz, npz_labels, npz_values, checkpoint, cifar10, cifar100, mnist, fashion_mnist, svhn, "
        "imagefolder, maskfolder, boxfolder, coco, images, tar, parquet",
    )
    kwargs: Loading[dict[str, Any]] = Field(
        default_factory=dict, description="Dataset: further keyword arguments of its class or function"
    )
    root: External[PathText | tuple[PathText, ...] | None] = Field(
        default=None,
        description="file or folder of the data; for tar and parquet also a pattern with {train,val}, {0000..1023} "
        "and *, or a list of files, patterns and folders, whose names say which split they are of; ${VARIABLES} of "
        "the environment are filled in",
    )
    train_split: Loading[PathText] = Field(
        default="train",
        description="imagefolder: sub-folder of the training images; tar, parquet: their part of the names",
    )
    eval_split: Loading[PathText] = Field(
        default="val",
        description="imagefolder: sub-folder of the evaluation images; tar, parquet: their part of the names; "
        "checkpoint: an .npz file with the evaluation images",
    )
    classes: Loading[tuple[Annotated[int, Field(ge=0, le=LONG)], ...] | None] = Field(
        default=None, description="arrays: classes whose images are used, renumbered from 0 in this order; default: all"
    )
    class_order: Loading[Literal["text", "natural"] | None] = Field(
        default=None,
        description="image files: numbering of the class folders: text is 0, 1, 10, 2 (torchvision's), natural is 0, "
        "1, 2, 10 (timm's); default: text, with a warning if weights from elsewhere may use the other",
    )
    class_map: External[PathText | None] = Field(
        default=None,
        description="image files: file of class names in the order of their numbers, one name a line or JSON",
    )
    layout: Loading[Literal["nhwc", "nchw"] | None] = Field(
        default=None, description="npz: axes of the images; default: nhwc, and arrays that look like nchw are refused"
    )
    mean: Loading[tuple[Annotated[float, Field(ge=-1000, le=1000)], ...] | None] = Field(
        default=None, description="mean of each channel for normalisation, on [0, 1]; default: the model's own"
    )
    std: Loading[tuple[Annotated[float, Field(gt=0, le=1000)], ...] | None] = Field(
        default=None,
        description="standard deviation of each channel for normalisation, on [0, 1]; default: the model's own",
    )
    image_size: InputShape[Side | tuple[Side, Side] | None] = Field(
        default=None,
        description="side of the square input in pixels, or [height, width]; default: the model's own, for arrays "
        "their side",
    )
    crop: Loading[float | None] = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the resized image's side that is cropped (crop_pct); default: the model's own",
    )
    interpolation: Loading[Literal["bilinear", "bicubic", "nearest"] | None] = Field(
        default=None, description="interpolation of resizing; default: the model's own"
    )
    crop_mode: Loading[Literal["center", "squash", "border"] | None] = Field(
        default=None,
        description="image files: fit to the square input: center cuts, squash squeezes, border pads; default: the "
        "model's own",
    )
    exif: Loading[bool] = Field(
        default=True, description="image files: rotation of photographs by their EXIF orientation"
    )
    decoder: Loading[Literal["pillow", "torchvision", "simplejpeg"]] = Field(
        default="pillow",
        description="image files: library that decodes JPEG files; the pixels are the same. Images of other forms "
        "(grayscale, CMYK, rotated, PNG ...) are always decoded by Pillow",
    )
    dct_scaled: Loading[bool] = Field(
        default=False,
        description="image files: decoding of JPEG files at 1/2, 1/4 or 1/8 of their size where the resize makes them "
        "smaller still; faster, with other pixels (pillow and simplejpeg)",
    )
    resizer: Loading[Literal["pillow", "torch"]] = Field(
        default="pillow",
        description="image files: library that resizes them; torch uses vector instructions: faster, with pixels that "
        "differ by a few steps of 255",
    )
    augment: Augmentation[Literal["none", "crop", "crop_flip", "resized_crop_flip"]] = Field(
        default="none",
        description="augmentation of training images: crop pads and crops at random, flip mirrors half of them, "
        "resized_crop_flip is Inception's random resized crop",
    )
    padding: Augmentation[int | None] = Field(
        default=None,
        ge=0,
        le=SIDE,
        description="crop, crop_flip: padding on each side in pixels; default: an eighth of the side",
    )
    crop_scale: Augmentation[Span] = Field(
        default=(0.08, 1.0), description="resized_crop_flip: smallest and largest share of the image's area"
    )
    crop_ratio: Augmentation[Span] = Field(
        default=(3 / 4, 4 / 3), description="resized_crop_flip: smallest and largest aspect ratio"
    )
    auto_augment: Augmentation[str | None] = Field(
        default=None,
        max_length=200,
        description="timm's augmentation policy for training images, for example rand-m9-mstd0.5-inc1, original or "
        "augmix-m5-w4",
    )
    random_erasing: Augmentation[float] = Field(
        default=0, ge=0, le=1, description="probability that a rectangle of a training image is erased"
    )
    random_erasing_mode: Augmentation[Literal["const", "rand", "pixel"]] = Field(
        default="pixel",
        description="content of an erased rectangle: zeros (const), one normal colour (rand), normal noise (pixel)",
    )
    augment_on: Augmentation[Literal["host", "device"]] = Field(
        default="host",
        description="place of crops, flips and resizes of training images: the loader's processes (host), or the "
        "device, on whole batches; the same random numbers. Random erasing and mixup are always on the device",
    )
    resize_schedule: Annotated[
        dict[Annotated[int, Field(ge=0, le=LONG)], Annotated[int, Field(ge=1, le=SIDE)]],
        ReadBy(("train", "finetune", "finetune_between")),
    ] = Field(
        default_factory=dict,
        description="progressive resizing: first epoch -> side of training images in pixels, for example {0: 128, 30: "
        "192, "
        "60: 224}; evaluation uses image_size",
    )
    stage_to: External[PathText | None] = Field(
        default=None,
        description="image files, shards and .beton files: folder on the node's own disk, to which one process of each "
        "node copies them first, for example ${TMPDIR}; they are read from there",
    )
    backend: Operational[Literal["auto", "torch", "ffcv", "memory"]] = Field(
        default="auto",
        description="loader of the images; auto: ffcv if a matching .beton file lies beside the data (for evaluation "
        "only "
        "a file that keeps the pixels), memory for arrays, else torch",
    )
    workers: Operational[int] = Field(
        default=2, ge=0, le=1024, description="number of decoding processes per rank (torch and ffcv)"
    )
    on_error: Operational[Literal["fail", "skip"]] = Field(
        default="fail",
        description="effect of an image that cannot be read: fail ends the run, skip leaves the image out and lists "
        "it in the report",
    )

    @property
    def path(self) -> str | None:
        """``root`` where it is one path; None for a list of shards."""
        return self.root if isinstance(self.root, str) else None

    @model_validator(mode="after")
    def _check_root(self):
        if isinstance(self.root, tuple):
            if self.source not in SHARDS:
                raise ValueError(
                    f"data.root: a list is for shards ({' and '.join(SHARDS)}); data.source is {self.source}, which "
                    "takes one path"
                )
            splits = (self.train_split, self.eval_split)
            of_split = [shard_splits(entry, splits) for entry in self.root]
            for split in splits:
                if not any(split in found for found in of_split):
                    raise ValueError(
                        f"data.root: no entry of the list is of the split {split!r} (data.train_split and "
                        "data.eval_split are the parts of the names)"
                    )
        return self

    @model_validator(mode="after")
    def _check_source_keys(self):
        folders = "folders of images: labels of arrays are numbers already (see data.classes)"
        for key, sources, owner in (
            ("class_order", ("imagefolder", "tar", "parquet"), folders),
            ("class_map", ("imagefolder", "tar", "parquet"), folders),
            ("layout", ("npz", "npz_labels", "npz_values"), "the arrays of an .npz file"),
        ):
            if getattr(self, key) is not None and self.source not in sources:
                raise ValueError(f"data.{key} is for {owner}; data.source is {self.source}. Leave it out")
        if self.kwargs and self.source in SOURCES:
            raise ValueError(
                f"data.kwargs is for a Dataset (package.module:Dataset); data.source is {self.source}. Leave it out"
            )
        if self.class_map and self.class_order:
            raise ValueError("data.class_map gives the order of the classes: leave data.class_order out")
        return self

    @model_validator(mode="after")
    def _check_decoder(self):
        unmasked = tuple(set(IMAGE_FILES) - {"maskfolder"})
        for key, sources in (("decoder", IMAGE_FILES), ("dct_scaled", unmasked), ("resizer", unmasked)):
            if getattr(self, key) != type(self).model_fields[key].default and self.source not in sources:
                reason = "a mask needs its image's size" if self.source == "maskfolder" else "others are not decoded"
                reason = "masks are resized by Pillow" if key == "resizer" and self.source == "maskfolder" else reason
                raise ValueError(
                    f"data.{key} is for image files ({', '.join(sorted(sources))}); data.source is {self.source}: "
                    f"{reason}. Leave it out"
                )
        if self.stage_to and self.source not in COPIED:
            raise ValueError(
                f"data.stage_to is for image files ({', '.join(COPIED)}); data.source is {self.source}, whose images "
                "are read once. Leave it out"
            )
        if self.dct_scaled and self.decoder == "torchvision":
            raise ValueError(
                "data.dct_scaled: torchvision decodes at the full size alone; write data.decoder=simplejpeg or pillow"
            )
        if self.dct_scaled and self.resizer == "torch":
            raise ValueError(
                "data.resizer: torch resizes windows of whole pixels, and those of data.dct_scaled have fractions; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_resize_schedule(self):
        if self.source in ("boxfolder", "coco") and isinstance(self.image_size, tuple):
            raise ValueError(
                f"data.image_size: images with boxes are resized to squares, this is {list(self.image_size)} (height, "
                "width); write one side"
            )
        if self.resize_schedule and isinstance(self.image_size, tuple):
            raise ValueError(
                f"data.resize_schedule: its sides are those of squares, and data.image_size is "
                f"{list(self.image_size)} (height, width); leave one of them out"
            )
        if self.resize_schedule and min(self.resize_schedule) != 0:
            first = min(self.resize_schedule)
            raise ValueError(f"data.resize_schedule must begin at epoch 0, its first epoch is {first}")
        return self
