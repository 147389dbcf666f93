"""A map-style Dataset of (image, label) as a data source: ``package.module:Dataset``, ``./file.py:Dataset``, a plugin.

The class or function is called once for each split. Its images are read once when the split is opened: labels, sizes
and the identity of the data are known before any work. They stay in memory if they have one size and fit.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dist_prune import plugins
from dist_prune.data.array_files import MAX_CLASSES, MAX_NUMBERS_PER_LABEL
from dist_prune.data.random_access import SplitSpec
from dist_prune.errors import PruneError, shown

MEMORY = 2 << 30  # bytes of one split that each rank keeps in memory
MANY = 20_000  # images whose first reading is announced
CHANNELS = (1, 2, 3, 4)
FORM = "a PIL image, a uint8 array (height, width, channels), or a tensor (channels, height, width), uint8 or on [0, 1]"


@dataclass(frozen=True)
class DatasetSource:
    """One split of a Dataset. Sample ids are positions in it.

    Attributes:
        spec: the split, by which a loader's worker opens the Dataset again.
        labels: (n,) int64 class numbers.
        classes: class names in the order of their numbers.
        in_chans: channels of an image; 3 without a ``fixed_size``.
        fixed_size: (height, width) that all images share, or None.
        images: (n, H, W, C) uint8, or None if they do not fit into memory or differ in size.
        identity: sha256 of pixels and labels; that of an .npz file with the same images.
        dataset: the Dataset.
        note: what was converted, for the log.
    """

    spec: SplitSpec
    labels: np.ndarray
    classes: tuple[str, ...]
    in_chans: int
    fixed_size: tuple[int, int] | None
    images: np.ndarray | None
    identity: str
    dataset: Any
    note: str = ""

    @property
    def backends(self) -> tuple[str, ...]:
        """``memory`` if the pixels are there, and ``torch``."""
        return ("torch",) if self.images is None else ("memory", "torch")

    def location(self, sample: int) -> str:
        """Where a sample is stored, for messages."""
        return f"{self.spec.source}[{sample}]"

    def fetch(self, sample: int) -> np.ndarray:
        """Pixels of a sample, uint8: (H, W, C) with a ``fixed_size``, else (height, width, 3)."""
        if self.images is not None:
            return self.images[sample]
        pixels = _item(self.dataset, sample, self.spec)[0]
        return pixels if self.fixed_size is not None else _three_channels(pixels)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy for another process opens the Dataset again: it may hold open files."""
        spec = replace(self.spec, say=_say_nothing)
        fields = (self.labels, self.classes, self.in_chans, self.fixed_size, self.images, self.identity, self.note)
        return _reopened, (spec, *fields)


def _say_nothing(text: str) -> None:
    """Takes a line for the user, in a process that has none."""


def _reopened(
    spec: SplitSpec, labels: Any, classes: Any, in_chans: Any, size: Any, images: Any, identity: Any, note: Any
):
    dataset = None if images is not None else _make(spec)
    return DatasetSource(spec, labels, classes, in_chans, size, images, identity, dataset, note)


def open_dataset(spec: SplitSpec) -> DatasetSource:
    """Make the Dataset of a split and read all of its images once.

    Args:
        spec: the split; ``spec.source`` names a class or function, or an entry point in ``dist_prune.datasets``.

    Raises:
        PruneError: it cannot be imported or called, it is no map-style Dataset of (image, label), an image or a label
            has a wrong form, sizes differ without ``data.image_size``, or an item differs when it is read twice.
    """
    dataset = _make(spec)
    count = len(dataset)
    if count == 0:
        raise PruneError(f"data.source: {_who(spec)} has no images")
    if count > MANY:
        spec.say(f"data: the {count:,} images of {_who(spec)} are read once")
    labels = np.empty(count, dtype=np.int64)
    images: np.ndarray | None = None
    plain, shaped = hashlib.sha256(), hashlib.sha256()
    shape, differs, rounded = (0, 0, 0), -1, 0
    for sample in range(count):
        pixels, labels[sample], inexact = _item(dataset, sample, spec)
        rounded += inexact
        if sample == 0:
            shape = pixels.shape
            images = np.empty((count, *shape), np.uint8) if count * pixels.nbytes <= MEMORY else None
        if pixels.shape[2] != shape[2]:
            raise PruneError(
                f"data.source: {_who(spec)}: image {sample} has {pixels.shape[2]} channel(s), image 0 has {shape[2]}; "
                "give all of them the same, for example image.convert('RGB')"
            )
        if pixels.shape != shape:
            differs, images = (sample if differs < 0 else differs), None
            _check_image_size(spec, sample, pixels.shape, shape)
        if images is not None:
            images[sample] = pixels
        plain.update(np.ascontiguousarray(pixels).data)
        shaped.update(f"{pixels.shape}".encode() + hashlib.sha256(np.ascontiguousarray(pixels).data).digest())
    _check_same_twice(dataset, spec, labels)
    whole = plain if differs < 0 else shaped
    return DatasetSource(
        spec,
        labels,
        _classes(dataset, labels, spec),
        shape[2] if differs < 0 else 3,
        (shape[0], shape[1]) if differs < 0 else None,
        images,
        hashlib.sha256(whole.hexdigest().encode() + labels.tobytes()).hexdigest(),
        dataset,
        f"{rounded:,} images with values between two of the 256 levels were rounded to them" if rounded else "",
    )


def _who(spec: SplitSpec) -> str:
    return f"{spec.source} ({'training' if spec.train else 'evaluation'} images)"


def _factory(source: str) -> Any:
    plugin = plugins.find("dataset", source)
    made = plugins.load(plugin) if plugin is not None else plugins.import_object(source, "data.source")
    if not callable(made):
        raise PruneError(f"data.source: {source} is a {type(made).__name__}; name a class or a function of a Dataset")
    return made


def _make(spec: SplitSpec) -> Any:
    """Call the class or function with the keywords that it takes; a PruneError if that gives no map-style Dataset."""
    factory = _factory(spec.source)
    keywords = _keywords(factory, spec)
    try:
        dataset: Any = factory(**keywords)
    except Exception as error:  # the user's code
        given = ", ".join(f"{key}={shown(value)}" for key, value in keywords.items())
        raise PruneError(f"data.source: {spec.source}({given}) fails: {type(error).__name__}: {error}") from error
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if missing or isinstance(dataset, torch.utils.data.IterableDataset):
        lacks = f"no {' and no '.join(missing)}" if missing else "an IterableDataset"
        raise PruneError(
            f"data.source: {spec.source} gives a {type(dataset).__name__}, which has {lacks}. A map-style Dataset is "
            "needed: images are addressed by their positions, so that every number of ranks sees the same ones"
        )
    try:
        len(dataset)
    except Exception as error:
        raise PruneError(f"data.source: the length of {_who(spec)} fails: {type(error).__name__}: {error}") from error
    return dataset


def _keywords(factory: Callable[..., Any], spec: SplitSpec) -> dict[str, Any]:
    """``data.kwargs``, and of root, train and split what the class or function takes."""
    own, takes = _parameters(factory)
    keywords = dict(spec.kwargs)
    told_apart = False
    for named in (own, takes):  # a class that names split may set its base's train itself
        for name, value in (("train", spec.train), ("split", spec.split)) if not told_apart else ():
            if name in named and name not in keywords:
                keywords[name], told_apart = value, True
    if spec.root is not None:
        if "root" not in takes:
            raise PruneError(f"data.root: {spec.source} takes no root; leave it out, or give the path by data.kwargs")
        if not isinstance(spec.root, str):
            raise PruneError(f"data.root: {spec.source} takes one path, not a list")
        root = Path(spec.root).expanduser()
        if not told_apart:
            root, told_apart = root / spec.split, True
        if not root.exists():
            key = "train_split" if spec.train else "eval_split"
            raise PruneError(f"data.root: there is no {root} (data.{key} names the folder of a split)")
        keywords.setdefault("root", str(root))
    if not told_apart:
        raise PruneError(
            f"data.source: {spec.source} takes none of train, split and root ({', '.join(takes) or 'nothing'}), so "
            "training and evaluation images would be the same. Give it a parameter train (a bool) or split (a text)"
        )
    transform = takes.get("transform")
    if transform is not None and transform.default is inspect.Parameter.empty:
        keywords.setdefault("transform", None)  # the recipe transforms
    return keywords


def _parameters(factory: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, inspect.Parameter]]:
    """The named parameters of a class or function; and with those of the class's bases, if it takes ``**kwargs``."""
    own: dict[str, inspect.Parameter] | None = None
    found: dict[str, inspect.Parameter] = {}
    for each in factory.__mro__[:-1] if isinstance(factory, type) else (factory,):
        try:
            parameters = inspect.signature(each).parameters.values()
        except (TypeError, ValueError):
            break
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found = {p.name: p for p in named} | found
        own = dict(found) if own is None else own
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return own or {}, found


def _item(dataset: Any, sample: int, spec: SplitSpec) -> tuple[np.ndarray, int, bool]:
    """Pixels (H, W, C) uint8 and label of an item, and whether values were rounded."""
    try:
        item = dataset[sample]
    except Exception as error:  # the user's code
        raise PruneError(f"data.source: {_who(spec)}[{sample}] fails: {type(error).__name__}: {error}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise PruneError(
            f"data.source: {_who(spec)}[{sample}] is a {type(item).__name__}{size}; it must be (image, label)"
        )
    try:
        pixels, inexact = to_pixels(item[0])
        return pixels, _label(item[1]), inexact
    except ValueError as error:
        raise PruneError(f"data.source: {_who(spec)}[{sample}]: {error}") from error


def _label(value: Any) -> int:
    label: Any = value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        label = value.item()
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**62:
        raise ValueError(f"its label is {shown(value)}; labels are class numbers from 0 on")
    return label


def to_pixels(image: Any) -> tuple[np.ndarray, bool]:
    """The pixels of an image of a Dataset.

    Args:
        image: a PIL image; a uint8 array (H, W, C) or (H, W); or a tensor (C, H, W) or (H, W), uint8 or float on
            [0, 1].

    Returns:
        (H, W, C) uint8, and whether some float value was none of the 256 levels and was rounded to the next one.

    Raises:
        ValueError: the image has another form.
    """
    inexact, pixels = False, image
    if isinstance(image, Image.Image):
        pixels = np.asarray(_eight_bits(image))
    elif isinstance(image, torch.Tensor):
        values = image.detach().cpu()
        if values.is_floating_point() and values.dim() in (2, 3) and values.numel():
            values, inexact = _levels(values)
        pixels = (values[None] if values.dim() == 2 else values).numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        form = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else f"a {type(image).__name__}"
        raise ValueError(f"its image is {form}; it must be {FORM}")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] not in CHANNELS or not pixels.size:
        is_tensor = isinstance(image, torch.Tensor)
        order = "(channels, height, width)" if is_tensor else "(height, width, channels)"
        shape = tuple(image.shape) if is_tensor else pixels.shape
        raise ValueError(f"its image is {shape}; that is no {order} with 1 to 4 channels")
    return pixels, inexact


def _levels(values: torch.Tensor) -> tuple[torch.Tensor, bool]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also for nan
        raise ValueError(
            f"its image has values from {low:g} to {high:g}, not on [0, 1]. Leave the normalisation to data.mean and "
            "data.std"
        )
    scaled = values.double() * 255
    levels = scaled.round()
    return levels.to(torch.uint8), bool(((scaled - levels).abs() > 0.01).any())


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode[0] in "IF":
        raise ValueError(f"its image has the mode {image.mode!r}; convert it to 'L' or 'RGB', with 8 bits")
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _three_channels(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _check_image_size(spec: SplitSpec, sample: int, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    if spec.image_size is None:
        raise PruneError(
            f"data.image_size: the images of {_who(spec)} differ in size: image {sample} is {shape[0]} x {shape[1]}, "
            f"image 0 is {first[0]} x {first[1]} (height x width). Write data.image_size=SIDE to resize and crop them "
            "to it"
        )
    if shape[2] not in (1, 3):
        raise PruneError(f"data.source: images of several sizes have 1 or 3 channels, those of {_who(spec)} {shape[2]}")


def _check_same_twice(dataset: Any, spec: SplitSpec, labels: np.ndarray) -> None:
    for sample in sorted({0, len(labels) // 2, len(labels) - 1}):
        first, again = _item(dataset, sample, spec), _item(dataset, sample, spec)
        if first[1] != labels[sample] or again[1] != labels[sample] or not np.array_equal(first[0], again[0]):
            raise PruneError(
                f"data.source: {_who(spec)}[{sample}] is another image or label when it is read again. Scores and "
                "evaluations need the same images each time: leave random augmentation to data.augment"
            )


def _classes(dataset: Any, labels: np.ndarray, spec: SplitSpec) -> tuple[str, ...]:
    """The names in ``dataset.classes``, else a number for each class of both splits."""
    given = getattr(dataset, "classes", None)
    if isinstance(given, list | tuple) and given:
        if labels.max() >= len(given):
            sample = int(labels.argmax())
            raise PruneError(
                f"data.source: {_who(spec)}[{sample}] has the label {labels[sample]}, but its classes are {len(given)}"
                f" (numbers 0 to {len(given) - 1})"
            )
        return tuple(map(str, given))
    other = np.fromiter(_other_labels(spec), dtype=np.int64)
    count = int(max(labels.max(), other.max(initial=-1))) + 1
    occurring = len(np.union1d(labels, other))
    if count > MAX_CLASSES and count > MAX_NUMBERS_PER_LABEL * occurring:
        raise PruneError(
            f"data.source: the labels of {spec.source} go up to {count - 1:,}, and only {occurring} numbers occur: "
            "number the classes from 0, or give the Dataset a list of its classes"
        )
    return tuple(map(str, range(count)))


def _other_labels(spec: SplitSpec) -> Iterator[int]:
    """The labels of the other split: without names, the classes are those of both."""
    other = replace(spec, train=not spec.train, split=spec.other_split, other_split=spec.split)
    dataset = _make(other)
    for sample in range(len(dataset)):
        yield _item(dataset, sample, other)[1]
