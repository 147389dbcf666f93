"""Which number a class folder has: by its name as text, in natural order, or by a file that lists the classes.

The index of a folder and a .beton are always in text order; what is served is renumbered. Labels of arrays are numbers.
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
    """Digits compare as numbers, letters without case: timm's key for class folders (timm.utils.misc.natural_key)."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def sort_classes(names: Sequence[str], order: str | None) -> list[str]:
    """Class names in text order (torchvision's), or in natural order (timm's).

    Raises:
        PruneError: two names that compare alike (a1 and a01, A and a): timm puts those in an order of chance.
    """
    text = sorted(names)
    if order != NATURAL:
        return text
    found = sorted(text, key=natural_key)
    for one, other in pairwise(found):
        if natural_key(one) == natural_key(other):
            raise PruneError(
                f"data.class_order: {one!r} and {other!r} are alike in natural order (timm orders them by chance): "
                "list the classes in a file and name it with data.class_map"
            )
    return found


def orders_differ(names: Sequence[str]) -> bool:
    """Whether the two orders give some class another number."""
    return sorted(names) != sorted(sorted(names), key=natural_key)


def read_class_map(place: Path) -> list[str]:
    """The classes of a class-map file, in the order of their numbers.

    Args:
        place: a text file with a name in each line (timm's form), or a .json file: a list of names, or {name: number}.

    Raises:
        PruneError: no such file, one that cannot be read, a name or a number twice, numbers with gaps.
    """
    try:
        text = place.expanduser().read_text(encoding="utf-8")
        found = json.loads(text) if place.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise PruneError(f"data.class_map: {place} cannot be read: {error}") from error
    if isinstance(found, dict):
        numbers = sorted(found.values()) if all(type(n) is int for n in found.values()) else None
        if numbers != list(range(len(found))):
            raise PruneError(f"data.class_map: the numbers in {place} are not 0 to {len(found) - 1}, each of them once")
        found = sorted(found, key=found.__getitem__)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise PruneError(f"data.class_map: {place} is neither a list of class names nor {{name: number}}")
    names = [name.strip() for name in found]
    while names and not names[-1]:  # the end of the last line
        names.pop()
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        raise PruneError(f"data.class_map: {place} lists " + (f"{twice[0]!r} twice" if twice else "no class"))
    return names


def renumber(source: Any, order: str | None, class_map: str | None) -> Any:
    """A source of image files with its classes in the order that the recipe asks for.

    Args:
        source: a ``FolderSource`` or ``FfcvSource`` in text order (arrays have neither key: the recipe refuses them).
        order: ``text``, ``natural``, or None: text.
        class_map: file of class names in the order of their numbers; it may list more than there are folders.

    Raises:
        PruneError: a file that cannot be read, or does not list a folder.
    """
    if order is None and class_map is None:
        return source
    classes = read_class_map(Path(class_map)) if class_map else sort_classes(source.classes, order)
    number = {name: place for place, name in enumerate(classes)}
    if missing := [name for name in source.classes if name not in number]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        near = nearest(missing[0], classes)
        raise PruneError(f"data.class_map: {class_map} does not list the class folder {missing[0]!r}{more}.{near}")
    if tuple(classes) == source.classes:
        return source
    labels = np.array([number[name] for name in source.classes], dtype=np.int64)[source.labels]
    mark = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape")).hexdigest()
    return replace(source, labels=labels, classes=tuple(classes), numbering=mark)


def identity(digest: str, numbering: str) -> str:
    """Of images and labels: ``digest`` in text order, another one where classes have other numbers."""
    return hashlib.sha256(f"{digest} {numbering}".encode()).hexdigest() if numbering else digest


def describe_order(classes: Sequence[str], empty: int, folders: int, order: str | None, class_map: str | None) -> str:
    """In words: the classes of a folder and who numbered them.

    Args:
        empty: how many of them have no training image.
        folders: how many have a folder.
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


def warning(classes: Sequence[str], order: str | None, class_map: str | None, weights: str) -> str:
    """Why a head from elsewhere may mean other classes; empty where it cannot, or where the recipe says its order."""
    if order or class_map or not orders_differ(classes):
        return ""
    text, natural = sorted(classes), sorted(sorted(classes), key=natural_key)
    at = next(n for n in range(len(text)) if text[n] != natural[n])
    return (
        f"WARNING: class folders are numbered as text here (number {at} is {text[at]!r}), as torchvision numbers them; "
        f"timm's reader numbers them naturally (number {at} is {natural[at]!r}). If timm trained the weights "
        f"({weights}), the classes are mixed up: write data.class_order=natural. data.class_order=text says that this "
        "order is right"
    )
