"""Checks that the training and the evaluation split of a run go together, and with its normalisation."""

from collections.abc import Sequence

from dist_prune.data.random_access import ImageSource
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


def check_same_classes(train: ImageSource, test: ImageSource) -> None:
    """Check that both splits have the same classes, so that labels mean the same.

    Args:
        train: the training split.
        test: the evaluation split.

    Raises:
        PruneError: names or order of the classes differ.
    """
    check_same_names(train.classes, test.classes)


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
    """Check that two splits have the same classes.

    Args:
        train: classes of the training images.
        test: classes of the evaluation images.

    Raises:
        PruneError: a class is missing in one of them.
    """
    if tuple(train) != tuple(test):
        missing, extra = sorted(set(train) - set(test))[:4], sorted(set(test) - set(train))[:4]
        raise PruneError(
            f"the evaluation images have {len(test)} classes, the training images {len(train)}; "
            f"missing in evaluation: {missing}, only there: {extra}. Both need the same class folders."
        )
