"""Images of a user's own loader, addressed by sample id: a DataLoader, a Dataset, or a list of batches.

Scores are merged by sample id. So what counts is which images there are, not which rank or which batch has them:
samplers that shard, shuffle or pad all give the same images.
"""

import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data._utils.collate import default_convert

from dist_prune.data.augment import AugmentKey
from dist_prune.data.box_batches import boxes_of_batch, equally_long
from dist_prune.data.loader import Batch
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError

IMAGE_KEYS = ("images", "image", "pixel_values", "inputs", "x")  # of batches that are mappings
LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def split_batch(batch: Any, targets: str = "classes") -> tuple[Tensor, Tensor | None]:
    """The images and targets of a user's batch.

    Args:
        batch: a tensor of images; a tuple or list (images, labels, ...); or a mapping with one of ``IMAGE_KEYS`` and
            perhaps one of ``LABEL_KEYS``.
        targets: what the labels are (see ``Task.targets``).

    Returns:
        Images (n, C, H, W) float, and labels or None: (n,) int64, masks (n, H, W) int64, labels (n, classes) int64,
        values (n, outputs) of floats, boxes (n, m, 6) float32.

    Raises:
        PruneError: the batch has another form.
    """
    images, labels = batch, None
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in IMAGE_KEYS if key in batch), None)
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list):
        images, labels = (*batch, None)[:2] if batch else (None, None)
    if targets == "boxes":
        return boxes_of_batch(images, labels)
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        form = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        keys = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise PruneError(
            f"the loader gives a {type(batch).__name__}{keys} whose images are {form}. A batch is (images, labels) "
            f"with images as a float tensor (n, C, H, W), or a mapping with one of {', '.join(IMAGE_KEYS)}"
        )
    if labels is None:
        return images, None
    labels = torch.as_tensor(labels)
    if targets == "anything" and (labels.shape != (len(images),) or labels.is_floating_point()):
        return images, None  # nothing is learned from them
    if targets not in ("classes", "anything"):
        return images, _checked_targets(images, labels, targets)
    if labels.shape != (len(images),) or labels.is_floating_point():
        raise PruneError(
            f"the loader's labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images; expected are "
            f"class numbers, int64 ({len(images)},)"
        )
    return images, labels.long()


def _checked_targets(images: Tensor, labels: Tensor, targets: str) -> Tensor:
    """The targets of a batch in the form that tasks read; PruneError if they have another one."""
    if targets == "masks" and labels.dim() == 4 and labels.shape[1] == 1:  # as torchvision's transforms give them
        labels = labels[:, 0]
    if targets == "values" and labels.dim() == 1:
        labels = labels[:, None]
    forms = {"masks": 3, "labels": 2, "values": 2}
    integers = targets != "values"
    if labels.dim() != forms[targets] or len(labels) != len(images) or (integers and labels.is_floating_point()):
        wanted = {"masks": "class numbers (n, H, W) int64", "labels": "0 and 1 (n, classes) int64"}
        raise PruneError(
            f"the loader's labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images; expected are "
            f"{wanted.get(targets, 'values (n, outputs) float')}"
        )
    return labels.long() if integers else labels.float()


@dataclass(frozen=True)
class _Source:
    """What a scoring context asks of the images beside their pixels."""

    loader: "SampleLoader"

    @property
    def labels(self) -> np.ndarray:
        return self.loader.labels.numpy()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the network's outputs: 0, 1, ...; empty until they are known."""
        return tuple(map(str, range(self.loader.outputs)))


class SampleLoader:
    """Loads the images of a user's loader in any order.

    Attributes:
        ids: (n,) int64 ids of all images, ascending: positions in the data set, or in the list of batches.
        device: where batches go.
        dtype: of the images of a batch.
        outputs: number of the network's outputs, 0 until it is known.
        skips: False; an image that cannot be read raises its own error.
    """

    skips = False

    def __init__(
        self, images: Any, comm: Communicator, device: torch.device, dtype: torch.dtype, targets: str = "classes"
    ):
        """Find out which images there are. All ranks call it.

        Args:
            images: a DataLoader over a map-style data set; such a data set; or a list, or another iterable, of batches
                that every rank has whole. See ``split_batch`` for the forms of a batch.
            comm: all processes.
            device: where batches go.
            dtype: of the images of a batch.
            targets: what the labels are (see ``Task.targets``).

        Raises:
            PruneError: the loader cannot be addressed by sample, draws with replacement, is empty, or differs between
                ranks.
        """
        self.device, self.dtype, self.targets = device, dtype, targets
        self._labels: Tensor | None = None
        self._classes: int | None = None
        self.outputs = 0
        self._loader: DataLoader[Any] | None = None
        self._held: tuple[Tensor, Tensor | None] | None = None
        self._kept: dict[bytes, Batch] | None = None
        if isinstance(images, Dataset):
            images = DataLoader(images, batch_size=50)
        if isinstance(images, DataLoader) and _has_ids(images, targets):
            self._loader = images
            self.ids = _sampled(images, comm)
        else:
            self._held = _concatenated(images, comm, targets)
            self.ids = np.arange(len(self._held[0]))
        if not len(self.ids):
            raise PruneError("the loader gives no image")

    def require_labels(self, classes: int) -> None:
        """Refuse from now on batches without labels, and labels that are no class of the network.

        Args:
            classes: number of the network's logits.

        Raises:
            PruneError: the first image has no label, or one that is no class.
        """
        if self._classes is None:
            self._classes = self.outputs = classes
            next(self.batches([self.ids[:1]]))

    @property
    def source(self) -> _Source:
        return _Source(self)

    def __len__(self) -> int:
        """Ids are below this number."""
        return int(self.ids[-1]) + 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the first image."""
        return tuple(next(self.batches([self.ids[:1]])).images.shape[1:])

    @property
    def labels(self) -> Tensor:
        """(len(self),) int64 class numbers on the CPU, -1 at ids that are not among ``ids``.

        The first use may load every image once.

        Raises:
            PruneError: the loader has no labels.
        """
        if self._labels is None:
            found = torch.full((len(self),), -1, dtype=torch.int64)
            for start in range(0, len(self.ids), 50):
                batch = next(self.batches([self.ids[start : start + 50]]))
                found[batch.ids] = batch.labels.cpu()
            self._labels = found
        return self._labels

    def batches(self, lists: Iterable[np.ndarray], augment: AugmentKey | None = None) -> Iterator[Batch]:
        """Load one batch for each list of ids.

        Args:
            lists: (n,) int64 sample ids of each batch.
            augment: ignored: the images are transformed by the user's data set.

        Yields:
            The batches in the order of the lists.

        Raises:
            PruneError: a batch has another form than ``split_batch`` reads, or no labels.
        """
        orders = [np.ascontiguousarray(ids) for ids in lists]
        if self._kept is not None:
            yield from self._kept_batches(orders, self._kept)
            return
        for ids, batch in zip(orders, self._raw(orders), strict=True):
            images, labels = split_batch(batch, self.targets)
            if self._classes is not None:
                _check_labels(labels, self._classes)
            if labels is None:
                labels = torch.full((len(images),), -1, dtype=torch.int64)
            yield Batch(
                images.to(self.device, self.dtype, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                torch.from_numpy(ids),
            )

    def _kept_batches(self, orders: Sequence[np.ndarray], kept: dict[bytes, Batch]) -> Iterator[Batch]:
        fresh = copy.copy(self)
        fresh._kept = None
        read = fresh.batches([ids for ids in orders if ids.tobytes() not in kept])
        for ids in orders:
            if ids.tobytes() not in kept:
                kept[ids.tobytes()] = next(read)
            yield kept[ids.tobytes()]

    def holding(self) -> "SampleLoader":
        """A loader of the same images that reads each list of ids once and holds its batch, on the device."""
        held = copy.copy(self)
        held._kept = {}
        return held

    def _raw(self, orders: Sequence[np.ndarray]) -> Iterator[Any]:
        if self._held is not None:
            images, labels = self._held
            for ids in orders:
                index = torch.from_numpy(ids)
                yield images[index], None if labels is None else labels[index]
            return
        assert self._loader is not None
        yield from DataLoader(
            self._loader.dataset,
            batch_sampler=[ids.tolist() for ids in orders],  # type: ignore[arg-type]
            num_workers=self._loader.num_workers,
            # a loader with batch_size=None does not collate
            collate_fn=default_collate if self._loader.collate_fn is default_convert else self._loader.collate_fn,
            worker_init_fn=self._loader.worker_init_fn,
        )


def _has_ids(loader: DataLoader[Any], targets: str) -> bool:
    """Whether a loader's images are items of a map-style data set, one each."""
    if isinstance(loader.dataset, IterableDataset):
        return False
    if loader.batch_sampler is not None or not isinstance(loader.dataset, Sized) or not len(loader.dataset):
        return True
    try:  # batch_size=None: an item may be a whole batch
        split_batch(loader.collate_fn(loader.dataset[0]), targets)
    except PruneError:
        return True
    return False


def _check_labels(labels: Tensor | None, classes: int) -> None:
    """PruneError unless there are labels from 0 to ``classes - 1``."""
    if labels is None:
        raise PruneError("this method needs labels, and the loader gives images alone: give (images, labels)")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise PruneError(
            f"the loader's labels contain {int(wrong[0])}; the network has {classes} classes, so labels are 0 to "
            f"{classes - 1}"
        )


def _sampled(loader: DataLoader[Any], comm: Communicator) -> np.ndarray:
    """Ids of the images that the samplers of all ranks name, ascending, each once: shards unite, pads are dropped.

    Samplers are asked for images, not for batches: an incomplete last batch that ``drop_last`` leaves out would be
    another one at each shuffle, and on each number of ranks.
    """
    if not isinstance(loader.dataset, Sized):
        raise PruneError(f"the loader's {type(loader.dataset).__name__} has no length, so its images have no ids")
    batches: Any = loader.batch_sampler
    while isinstance(getattr(batches, "batch_sampler", None), Iterable):  # accelerate's shard of the whole
        batches = batches.batch_sampler
    sampler: Any = batches.sampler if isinstance(batches, BatchSampler) else getattr(loader, "sampler", None)
    if isinstance(sampler, WeightedRandomSampler) or (isinstance(sampler, RandomSampler) and sampler.replacement):
        raise PruneError(
            f"the loader's {type(sampler).__name__} draws images with replacement, so which images are scored would "
            "depend on chance. Give a loader without a sampler, or the data set itself"
        )
    if isinstance(sampler, RandomSampler) and sampler.num_samples < len(loader.dataset):
        raise PruneError(
            f"the loader's RandomSampler draws {sampler.num_samples} of {len(loader.dataset)} images, so which images "
            "are scored would depend on chance. Give the data set itself, and images=N draws N of them by the seed"
        )
    if isinstance(sampler, DistributedSampler):  # shuffles of several ranks need not fit one another
        mine = list(range(len(loader.dataset)))
    else:
        with torch.random.fork_rng(devices=[]):  # a shuffling sampler draws from torch's generator
            named = sampler if batches is None or isinstance(batches, BatchSampler) else itertools.chain(*batches)
            mine = sorted({int(i) for i in named or ()})
    found = sorted({i for ids in comm.all_gather_object(mine) for i in ids})
    return np.array(found, dtype=np.int64)


def _whole(images: Any) -> Iterable[Any]:
    """The batches of an iterable; of a loader over an iterable data set, those of its whole data set.

    Raises:
        PruneError: it cannot be iterated.
    """
    if isinstance(images, DataLoader) and isinstance(images.dataset, IterableDataset):
        dataset = images.dataset
        while type(dataset).__name__ == "IterableDatasetShard":  # accelerate's part of one rank
            dataset = dataset.dataset  # type: ignore[attr-defined]
        # in this process: each worker would go through the whole data set
        return DataLoader(dataset, batch_size=images.batch_size, collate_fn=images.collate_fn)
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise PruneError(
            f"the loader is {images!r}; expected is a DataLoader, a Dataset, or an iterable of batches (images, labels)"
        )
    return images


def _concatenated(batches: Iterable[Any], comm: Communicator, targets: str) -> tuple[Tensor, Tensor | None]:
    """The images and labels of an iterable of batches, in its order; the same on every rank."""
    pairs = [split_batch(batch, targets) for batch in _whole(batches)]
    if not pairs:
        raise PruneError("the loader gives no image")
    if len({tuple(images.shape[1:]) for images, _ in pairs}) != 1:
        raise PruneError("the loader's images have several sizes; one network sees one size")
    if len({labels is None for _, labels in pairs}) != 1:
        raise PruneError("some of the loader's batches have labels and some have none")
    images = torch.cat([images.detach().cpu() for images, _ in pairs])
    parts = [labels.cpu() for _, labels in pairs if labels is not None]
    labels = torch.cat(equally_long(parts) if targets == "boxes" else parts) if parts else None
    whole = hashlib.sha256(images.contiguous().view(torch.uint8).numpy().tobytes())
    whole.update(b"" if labels is None else labels.numpy().tobytes())
    if len(set(comm.all_gather_object(whole.hexdigest()))) != 1:
        raise PruneError(
            "the iterable gives other images on other ranks. Images of a list or a generator have no ids, so shards "
            "cannot be put together: give every rank the whole list, or a DataLoader over a map-style data set, whose "
            "sampler may shard"
        )
    return images, labels
