"""Checks that the training and the evaluation split of a run go together, and with its normalisation."""

from collections.abc import Sequence
from typing import Any

from dist_prune.data.class_order import renumber
from dist_prune.data.random_access import ImageSource, target_kind
from dist_prune.data.transform_config import Size
from dist_prune.errors import PruneError


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, in_chans: int) -> None:
    """Check that mean and standard deviation of a recipe have a value for each channel of the images.

    Args:
        mean: the recipe's ``data.mean``, on [0, 1].
        std: the recipe's ``data.std``, on [0, 1].
        in_chans: channels of an image.

    Raises:
        PruneError: another number of values.
    """
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != in_chans:
            raise PruneError(f"data.{key}: {len(values)} values for images of {in_chans} channel(s)")


def check_labels(source: ImageSource, description: str) -> None:
    """Check that labels and classes agree.

    Args:
        source: the opened split.
        description: names the images in messages.

    Raises:
        PruneError: there is no image, there is a single class, or a label is not below the number of classes.
    """
    if len(source.labels) == 0:
        raise PruneError(f"{description}: there are no images")
    if target_kind(source) != "classes":  # what they are was checked when the source was opened
        return
    if len(source.classes) == 1:
        raise PruneError(
            f"{description}: all of them are of one class, {source.classes[0]!r}: there is nothing to learn"
        )
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= len(source.classes):
        raise PruneError(f"{description}: labels run from {low} to {high}, but there are {len(source.classes)} classes")


def check_splits(train: Any, test: Any, source: str, class_order: str | None, class_map: str | None) -> tuple[Any, Any]:
    """Check the labels and the classes of both splits, with their classes in the recipe's order.

    Args:
        train: the training split as it was opened.
        test: the evaluation split.
        source: the recipe's ``data.source``, for messages.
        class_order: the recipe's ``data.class_order``.
        class_map: the recipe's ``data.class_map``.

    Returns:
        Both splits in that order.

    Raises:
        PruneError: no images, a single class, a label without a class, or the classes of the splits differ.
    """
    ordered = []
    for split, name in ((train, "training"), (test, "evaluation")):
        ordered.append(renumber(split, class_order, class_map))
        check_labels(ordered[-1], f"the {name} images of {source}")
    if not getattr(train, "numbered", False):
        check_same_classes(train, test)
    elif ordered[0].classes != ordered[1].classes:
        train_count, test_count = (len(split.classes) for split in ordered)
        raise PruneError(
            f"the evaluation images have {test_count} classes, the training images {train_count} (their labels run to "
            f"{test_count - 1} and {train_count - 1}). Both splits need the same classes: if some class has no image "
            "in one of them, name all classes in the order of their numbers by data.class_map=FILE, one name a line"
        )
    return ordered[0], ordered[1]


def check_same_classes(train: ImageSource, test: ImageSource) -> None:
    """Check that both splits have the same classes, so that labels mean the same.

    Args:
        train: the training split.
        test: the evaluation split.

    Raises:
        PruneError: names or order of the classes differ.
    """
    check_same_names(train.classes, test.classes)


def empty_first_class(train: ImageSource, test: ImageSource) -> str:
    """Warn about class numbers that seem to start at 1.

    Args:
        train: the training split.
        test: the evaluation split.

    Returns:
        The warning; empty if there is an image of class 0, or if the labels are no class numbers of the files' own.
    """
    labels = [source.labels for source in (train, test)]
    numbers = tuple(map(str, range(len(train.classes))))
    if target_kind(train) != "classes" or train.classes != numbers or any(not len(own) for own in labels):
        return ""
    if any(int(own.min()) == 0 for own in labels):
        return ""
    return (
        f"WARNING: the labels run from {min(int(own.min()) for own in labels)} to "
        f"{max(int(own.max()) for own in labels)}, so no image has class 0, and the network gets {len(numbers)} "
        "outputs. If the numbers start at 1 in these files, subtract 1 from them; weights from elsewhere would be off "
        "by one class"
    )


def check_same_form(train: ImageSource, test: ImageSource, image_size: Size | None) -> None:
    """Check that the images of both splits fit one network.

    Args:
        train: the training split.
        test: the evaluation split.
        image_size: the recipe's ``data.image_size``, to which images of several sizes are resized.

    Raises:
        PruneError: the number of channels differs, or the size does and ``image_size`` is None.
    """
    if train.in_chans != test.in_chans:
        raise PruneError(
            f"the training images have {train.in_chans} channel(s), the evaluation images {test.in_chans}; one network "
            "takes one number"
        )
    if train.fixed_size != test.fixed_size and image_size is None:
        sizes = [" x ".join(map(str, source.fixed_size or ("any",))) for source in (train, test)]
        raise PruneError(
            f"data.image_size: the training images are {sizes[0]}, the evaluation images {sizes[1]}; write "
            "data.image_size=SIDE to resize both"
        )


def check_same_names(train: Sequence[str], test: Sequence[str]) -> None:
    """Check that two splits have the same classes with the same numbers.

    Args:
        train: classes of the training images, in the order of their numbers.
        test: classes of the evaluation images.

    Raises:
        PruneError: a class is missing in one of them, or has another number.
    """
    if tuple(train) == tuple(test):
        return
    missing, extra = sorted(set(train) - set(test))[:4], sorted(set(test) - set(train))[:4]
    if missing or extra:
        raise PruneError(
            f"the evaluation images have {len(test)} classes, the training images {len(train)}; "
            f"missing in evaluation: {missing}, only there: {extra}. Both splits need the same classes"
        )
    number = next(i for i, (a, b) in enumerate(zip(train, test, strict=False)) if a != b)
    raise PruneError(
        f"both splits have the same {len(train)} classes, in other orders: number {number} is {train[number]!r} in the "
        f"training images and {test[number]!r} in the evaluation images, so labels mean other classes. Write the files "
        "anew with one order"
    )
