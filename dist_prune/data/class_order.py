"""Class numbers of class folders: in text order, in natural order, or from a file that lists the classes.

The index of a folder and a .beton are always in text order. ``renumber`` changes the labels of an opened source.
Labels of arrays are numbers already.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dist_prune.errors import PruneError, nearest

TEXT, NATURAL = "text", "natural"


def natural_key(name: str) -> list[Any]:
    """Sort key of timm (timm.utils.misc.natural_key): digits compare as numbers, letters without case."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def sort_classes(names: Sequence[str], order: str | None) -> list[str]:
    """Sort class names.

    Args:
        names: the class folders.
        order: ``text`` or None for torchvision's order, ``natural`` for timm's.

    Raises:
        PruneError: two names are alike in natural order (a1 and a01, A and a). timm orders such names by chance.
    """
    text = sorted(names)
    if order != NATURAL:
        return text
    natural = sorted(text, key=natural_key)
    for name, other in pairwise(natural):
        if natural_key(name) == natural_key(other):
            raise PruneError(
                f"data.class_order: {name!r} and {other!r} are alike in natural order (timm orders them by chance): "
                "list the classes in a file and name it with data.class_map"
            )
    return natural


def orders_differ(names: Sequence[str]) -> bool:
    """Whether text order and natural order give some class another number."""
    return sorted(names) != sorted(sorted(names), key=natural_key)


def read_class_map(path: Path) -> list[str]:
    """Read the classes of a class-map file, in the order of their numbers.

    Args:
        path: a text file with one name a line (timm's form), or a .json file with a list of names or {name: number}.

    Raises:
        PruneError: the file is missing or unreadable, a name or a number occurs twice, or the numbers have gaps.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise PruneError(f"data.class_map: {path} cannot be read: {error}") from error
    if isinstance(entries, dict):
        numbers = sorted(entries.values()) if all(type(n) is int for n in entries.values()) else None
        if numbers != list(range(len(entries))):
            raise PruneError(
                f"data.class_map: the numbers in {path} are not 0 to {len(entries) - 1}, each of them once"
            )
        entries = sorted(entries, key=entries.__getitem__)
    if not isinstance(entries, list) or not all(isinstance(name, str) for name in entries):
        raise PruneError(f"data.class_map: {path} is neither a list of class names nor {{name: number}}")
    names = [name.strip() for name in entries]
    while names and not names[-1]:  # the line break at the end of the file
        names.pop()
    duplicates = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if duplicates or not names:
        raise PruneError(f"data.class_map: {path} lists " + (f"{duplicates[0]!r} twice" if duplicates else "no class"))
    return names


def renumber(source: Any, order: str | None, class_map: str | None) -> Any:
    """Put the classes of a source of image files into the order that the recipe asks for.

    Args:
        source: of image files, in text order. The recipe refuses both keys for arrays.
        order: ``text``, ``natural`` or None, which means ``text``.
        class_map: file of class names in the order of their numbers; it may list more classes than there are folders.

    Returns:
        The source itself if no number changes, else a copy with other ``labels``, ``classes`` and ``numbering``.

    Raises:
        PruneError: the file cannot be read or does not list a folder.
    """
    if order is None and class_map is None:
        return source
    if getattr(source, "numbered", False):
        return _name_numbers(source, order, class_map)
    classes = read_class_map(Path(class_map)) if class_map else sort_classes(source.classes, order)
    number = {name: index for index, name in enumerate(classes)}
    if missing := [name for name in source.classes if name not in number]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        near = nearest(missing[0], classes)
        raise PruneError(f"data.class_map: {class_map} does not list the class folder {missing[0]!r}{more}.{near}")
    if tuple(classes) == source.classes:
        return source
    labels = np.array([number[name] for name in source.classes], dtype=np.int64)[source.labels]
    digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape")).hexdigest()
    return replace(source, labels=labels, classes=tuple(classes), numbering=digest)


def _name_numbers(source: Any, order: str | None, class_map: str | None) -> Any:
    """Give the numbers of a source that holds numbers the names of a class map."""
    if class_map is None:
        raise PruneError(f"data.class_order: {order!r}, but these images have class numbers already: leave it out")
    classes = read_class_map(Path(class_map))
    if len(source.classes) > len(classes):
        raise PruneError(
            f"data.class_map: {class_map} lists {len(classes)} classes, and there are images of class number "
            f"{len(source.classes) - 1}"
        )
    digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape")).hexdigest()
    return replace(source, classes=tuple(classes), numbering=digest)


def renumbered_identity(digest: str, numbering: str) -> str:
    """Identity of images and labels: ``digest`` in text order, another digest for another ``numbering``."""
    return hashlib.sha256(f"{digest} {numbering}".encode()).hexdigest() if numbering else digest


def describe_order(classes: Sequence[str], empty: int, folders: int, order: str | None, class_map: str | None) -> str:
    """Describe the classes of a folder and their numbers in words.

    Args:
        classes: class names in the order of their numbers.
        empty: number of classes without a training image.
        folders: number of classes that have a folder.
        order: the recipe's ``data.class_order``.
        class_map: the recipe's ``data.class_map``.
    """
    shown = ", ".join(classes) if len(classes) <= 12 else f"{', '.join(classes[:6])}, ... {classes[-1]}"
    if class_map:
        missing = max(empty, len(classes) - folders)
        more = f", {missing} of which have no image here" if missing else ""
        return f"{len(classes)} classes, numbered by {class_map}{more}: {shown}"
    same = (
        ""
        if orders_differ(classes)
        else ("; natural order is the same" if order != NATURAL else "; text order is the same")
    )
    return f"{len(classes)} classes, numbered in {order or TEXT} order: {shown}{same}"


def class_order_warning(classes: Sequence[str], order: str | None, class_map: str | None, weights: str) -> str:
    """Warn that the weights of a classifier from elsewhere may belong to another class order.

    Args:
        classes: the class folders.
        order: the recipe's ``data.class_order``.
        class_map: the recipe's ``data.class_map``.
        weights: where the weights come from, for the message.

    Returns:
        The warning. Empty if the orders agree, or if the recipe states an order.
    """
    if order or class_map or not orders_differ(classes):
        return ""
    text, natural = sorted(classes), sorted(sorted(classes), key=natural_key)
    index = next(i for i in range(len(text)) if text[i] != natural[i])
    return (
        f"WARNING: class folders are numbered as text here (number {index} is {text[index]!r}), as torchvision numbers "
        f"them; timm's reader numbers naturally (number {index} is {natural[index]!r}). If timm trained the weights "
        f"({weights}), the classes are mixed up: write data.class_order=natural. data.class_order=text says that this "
        "order is right"
    )
