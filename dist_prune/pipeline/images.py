"""The images of a run: splits, transforms, loaders, and the ids that train, validate and calibrate."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune import models
from dist_prune.config import loading
from dist_prune.config.recipe import Recipe
from dist_prune.config.training import Training
from dist_prune.data.array_files import check_sides
from dist_prune.data.class_order import describe_order
from dist_prune.data.datasets import DatasetKeys, select_classes
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.open_split import OpenSplit, open_split
from dist_prune.data.random_access import ImageSource, target_kind
from dist_prune.data.sampling import holdout_split, micro_batches, shard
from dist_prune.data.split_checks import check_normalisation, check_same_form, check_splits, empty_first_class
from dist_prune.data.staging import stage
from dist_prune.data.transform_config import Size, sides_of
from dist_prune.distributed import preemption
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.methods.base import Method
from dist_prune.pipeline.start_network import StartNetwork
from dist_prune.training.tracking import Tracker


@dataclass
class RunImages:
    """Training and evaluation images of one run.

    Splits are keyed by a bool: True for the training split, False for the evaluation split. Ids are sample ids of a
    split, int64 and ascending unless said otherwise.

    Attributes:
        recipe: The validated recipe.
        environment: The device and the processes of this run.
        tracker: The log.
        unreadable: Split -> sample id -> the reason why this rank left the image out, in the running stage.
    """

    recipe: Recipe
    environment: DistributedEnvironment
    tracker: Tracker
    unreadable: dict[bool, dict[int, str]] = field(default_factory=lambda: {True: {}, False: {}})
    _loaders: dict[bool, ImageLoader] = field(default_factory=dict)

    @cached_property
    def splits(self) -> dict[bool, OpenSplit]:
        """The training and the evaluation split, opened when first read.

        Raises:
            PruneError: Data are missing or malformed, or the splits differ in their classes.
        """
        data = self.recipe.data
        splits: dict[bool, OpenSplit] = {}
        unrenumbered: dict[bool, ImageSource] = {}
        for train in (True, False):
            description = f"{'training' if train else 'evaluation'} images"
            split = open_split(
                data.backend,
                data.source,
                data.root,
                data.train_split if train else data.eval_split,
                train,
                self.tracker.info,
                lambda source, train=train: self._resized_side(source, train),
                data.layout,
                DatasetKeys.of(data),
            )
            unrenumbered[train] = select_classes(split.source, data.classes)
            splits[train] = split
            self.tracker.info(f"data: {description} come through the {split.backend} backend ({split.why})")
        order, class_map = data.class_order, data.class_map
        ordered = check_splits(unrenumbered[True], unrenumbered[False], data.source, order, class_map)
        splits = {train: replace(splits[train], source=ordered[not train]) for train in splits}
        numbered = getattr(unrenumbered[True], "numbered", False)
        check_same_form(unrenumbered[True], unrenumbered[False], data.image_size)
        classes = splits[True].source.classes
        empty = len(classes) - len(np.unique(splits[True].source.labels))
        if target_kind(splits[True].source) != "classes":
            self.tracker.info(f"data: {_target_text(splits[True].source)}")
        elif data.source == "imagefolder" or (data.source in ("tar", "parquet") and not numbered):
            message = describe_order(classes, empty, len(unrenumbered[True].classes), data.class_order, data.class_map)
            self.tracker.info(f"data: {message}")
        elif empty:
            self.tracker.info(f"data: {len(classes)} classes, {empty} of which have no training image")
        if warning := empty_first_class(*ordered):
            self.tracker.info(warning)
        return splits

    def stage_files(self) -> None:
        """Copy the images' files to the node's own disk, if the recipe says so, and read them there. All ranks call it.

        Raises:
            PruneError: There is too little space, or the files cannot be copied.
        """
        if self.recipe.data.stage_to is None:
            return
        place = loading.fill_here(self.recipe, "data", "stage_to")
        sources = {train: split.source for train, split in self.splits.items()}
        for train, source in stage(sources, place, self.environment.comm, self.tracker.info).items():
            self.splits[train] = replace(self.splits[train], source=source)
        self.close_loaders()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return self.splits[True].source.classes

    @property
    def in_channels(self) -> int:
        """Number of input channels of an image."""
        return self.splits[True].source.in_chans

    @cached_property
    def transform(self) -> TransformConfig:
        """The transform configuration: the backbone's own values, overridden by the recipe's."""
        return self._transform_of(self.splits[True].source)

    def _transform_of(self, source: ImageSource) -> TransformConfig:
        data, backbone = self.recipe.data, self.recipe.backbone
        model = models.create(backbone.name, len(source.classes), source.in_chans, False, backbone.kwargs)
        config = models.image_config(model, source.in_chans)
        if backbone.bundle:
            config |= StartNetwork(backbone).image_config()
        if source.fixed_size is not None:
            check_sides(*source.fixed_size, data.image_size)
            for key in ("crop", "crop_mode", "interpolation"):
                if getattr(data, key) is not None:
                    raise PruneError(
                        f"data.{key} is for image files; arrays are used whole (data.image_size resizes them)"
                    )
            config |= {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
        native = source.fixed_size[0] if source.fixed_size else config_size(config["input_size"])
        check_normalisation(data.mean, data.std, source.in_chans)
        size = data.image_size or native
        side = min(sides_of(size))
        if data.padding is not None and data.padding > side:
            raise PruneError(f"data.padding: {data.padding} pixels around images of side {side}; at most {side}")
        return TransformConfig(
            size=size,
            mean=data.mean or tuple(config["mean"]),
            std=data.std or tuple(config["std"]),
            crop=data.crop or config["crop_pct"],
            interpolation=data.interpolation or config["interpolation"],
            augment=data.augment,
            crop_mode=data.crop_mode or config["crop_mode"],
            exif=data.exif,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            auto_augment=data.auto_augment,
            erasing=data.random_erasing,
            erasing_mode=data.random_erasing_mode,
            schedule=tuple(sorted(data.resize_schedule.items())),
            padding=data.padding,
            decoder=data.decoder,
            dct_scaled=data.dct_scaled,
            augment_on=data.augment_on,
            resizer=data.resizer,
        )

    def _resized_side(self, source: ImageSource, train: bool) -> int:
        """The side in pixels that the recipe resizes shorter sides to before it crops, the largest of a schedule."""
        transform = self._transform_of(source)
        scheduled = (size for _, size in transform.schedule if train)
        return max(math.floor(min(transform.sides) / transform.crop), *scheduled, 0)

    @property
    def example_input(self) -> Tensor:
        """One input of the network's size, (1, C, H, W) float32, the same noise in every run."""
        shape = (1, self.in_channels, *self.transform.sides)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def loader(self, train: bool) -> ImageLoader:
        """The loader of the training or of the evaluation images; the same one, with its workers, for a whole stage."""
        if train not in self._loaders:
            split, data = self.splits[train], self.recipe.data
            self._loaders[train] = ImageLoader(
                split.source,
                self.transform,
                self.environment.device,
                data.workers,
                backend=split.backend,
                on_error=data.on_error,
                skipped=self.unreadable[train],
            )
        return self._loaders[train]

    def close_loaders(self) -> None:
        """Stop the loaders' workers at the end of a stage."""
        for loader in self._loaders.values():
            loader.close()
        self._loaders.clear()

    def training_split(self, settings: Training) -> tuple[np.ndarray, np.ndarray]:
        """Split the training images for one training.

        Args:
            settings: The recipe's section of the training.

        Returns:
            Ids of the images to learn from, and ids of those held out to select the epoch (none if the test images
            select it); each (n,) int64.
        """
        count = len(self.splits[True].source.labels)
        share = settings.holdout if settings.selection == "holdout" else 0.0
        return holdout_split(np.arange(min(count, settings.images or count)), share, self.recipe.seed)

    def holdout(self) -> tuple[np.ndarray, list[str]]:
        """The training images that ``train.holdout`` holds out.

        Returns:
            Their ids, (n,) int64; and the names of the trainings that learn from some of them nevertheless.
        """
        recipe, loader = self.recipe, self.loader(True)
        ids = np.arange(min(len(loader), recipe.train.images or len(loader)))
        learning = [
            name
            for name, section in (("train", recipe.train), ("finetune", recipe.finetune))
            if section.epochs and (section.selection != "holdout" or section.holdout < recipe.train.holdout)
        ]
        return holdout_split(ids, recipe.train.holdout, recipe.seed)[1], learning

    def for_scoring(self, ids: np.ndarray, method: Method) -> tuple[ImageLoader, np.ndarray]:
        """The images for a method's scoring, without the schedule of image sizes.

        Args:
            ids: (n,) ids of the split that the method calibrates on.
            method: The method that scores.

        Returns:
            The loader, and those of ``ids`` that can be read.
        """
        loader = self.loader(method.calibration_split != "test")
        return self.readable(replace(loader, transform=replace(self.transform, schedule=())), ids)

    def readable(self, loader: ImageLoader, ids: np.ndarray) -> tuple[ImageLoader, np.ndarray]:
        """Restrict ids to the images that can be read. All ranks call it.

        With ``data.on_error: skip`` all images are read once, and unreadable ones are removed on every rank: statistics
        are addressed by image, so all ranks have to know beforehand which images are scored.

        Args:
            loader: A loader of the split.
            ids: (n,) ids.

        Returns:
            A loader that raises at an unreadable image, and the ids that can be read.
        """
        if not loader.skips:
            return loader, ids
        comm, batches_of_ids = self.environment.comm, micro_batches(ids, self.recipe.score.micro_batch)
        batches = loader.batches(shard(batches_of_ids, comm.rank, comm.world))
        for _ in range(-(-len(batches_of_ids) // comm.world)):
            if preemption.poll(comm)[0]:
                raise preemption.preempted_error("while images were checked")
            next(batches, None)
        unreadable = {sample for samples in comm.all_gather_object(sorted(loader.skipped)) for sample in samples}
        if unreadable:
            self.tracker.info(
                f"  {len(unreadable & set(ids.tolist()))} of {len(ids)} images cannot be read and are left out"
            )
        return replace(loader, exact=True), ids[~np.isin(ids, sorted(unreadable))]

    def take_unreadable(self) -> list[dict[str, Any]]:
        """Return and clear the images that any rank left out in the running stage. All ranks call it.

        Returns:
            A dict per image, for the ledger: ``images`` (training or evaluation), ``id``, ``file``, ``why``.
        """
        if self.recipe.data.on_error == "fail":
            return []
        skipped = []
        for train, split in ((True, "training"), (False, "evaluation")):
            gathered = self.environment.comm.all_gather_object(dict(self.unreadable[train]))
            self.unreadable[train].clear()
            reasons = {sample: why for by_id in gathered for sample, why in by_id.items()}
            source = self.splits[train].source
            for sample, why in sorted(reasons.items()):
                skipped.append({"images": split, "id": sample, "file": source.location(sample), "why": why})
        return skipped

    def description(self) -> dict[str, Any]:
        """The images' backend and transforms, for the report."""
        body = asdict(self.transform)
        evaluation_keys = (
            "size", "mean", "std", "crop", "crop_mode", "interpolation", "exif", "decoder", "dct_scaled", "resizer"
        )  # fmt: skip
        training = {key: value for key, value in body.items() if key not in evaluation_keys}
        backends_used = {name: self.splits[name == "train"].backend for name in ("train", "eval")}
        return {
            "backend": backends_used,
            "eval_transform": {key: body[key] for key in evaluation_keys},
            "training": training,
        }


def config_size(input_size: Sequence[int]) -> Size:
    """The size of the images that a network's config names, (C, H, W): the side of squares, or (height, width)."""
    _, height, width = input_size
    return height if height == width else (height, width)


def _target_text(source: ImageSource) -> str:
    """The targets of the training images, for the log."""
    names, pixels = source.classes, getattr(source, "pixels", None)
    if target_kind(source) == "boxes":
        return _box_text(source)
    if target_kind(source) == "nothing":
        return f"{len(source.labels):,} training images without classes"
    if pixels is None:
        return f"{len(source.labels):,} training images with {len(names)} {target_kind(source)} each"
    *counts, void = pixels
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    text = f"masks of {len(names)} classes, {void / max(1, sum(pixels)):.1%} of the training pixels are void"
    return text + (f"; no training pixel is of {', '.join(absent)}" if absent else "")


def _box_text(source: Any) -> str:
    """The boxes of the training images, for the log."""
    kinds = source.targets[..., 0]
    counts = ", ".join(f"{name} {int((kinds == number).sum()):,}" for number, name in enumerate(source.classes))
    empty = int((kinds < 0).all(1).sum())
    note = f"; {source.note}" if source.note else ""
    return f"boxes of {len(source.classes)} classes in the training images ({counts}), {empty} images have none{note}"
