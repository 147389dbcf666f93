"""Labels in tar shards: the ``.cls`` or ``.json`` member of a sample, and the class numbers of all samples."""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from dist_prune.errors import PruneError

LABEL_FILES = (".cls", ".json")  # ends of the members' names, of any case
LABEL_KEYS = ("label", "cls", "class", "target", "class_id", "label_id")  # of a sample's .json, the first with a value
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


class StoredLabel(NamedTuple):
    """What one member says about its sample's label.

    Attributes:
        rank: the smaller, the rather it is the label: ``0001.cls`` before ``0001.json`` before ``0001.coarse.cls``.
        value: class number or class name; None if it says neither.
        problem: why there is no value.
    """

    rank: tuple[bool, bool]
    value: int | str | None
    problem: str = ""

    def preferred(self, other: "StoredLabel | None") -> "StoredLabel":
        """This one or another one of the same sample: one with a value, then the one with the smaller rank.

        Raises:
            ValueError: both are of the first rank or the second, and differ: the same member is there twice.
        """
        if other is None:
            return self
        if self.rank == other.rank and not self.rank[0] and self.value != other.value:
            raise ValueError(f"it is there twice, with {other.value!r} and {self.value!r}: leave one out")
        return min(other, self, key=lambda label: (label.value is None, label.rank))


def read_label(content: bytes, name: str) -> StoredLabel:
    """Read the label in a member of a shard.

    Numbers may be written as text (``"3"``) and as fractions without a remainder (``3.0``), in either form.

    Args:
        content: its bytes.
        name: its name without folders; it ends in one of ``LABEL_FILES``.
    """
    text = content.decode(errors="replace").removeprefix("\ufeff").strip()  # a byte order mark
    is_json = name.lower().endswith(".json")
    rank = (name.count(".") > 1, is_json)
    if not is_json:
        return StoredLabel(rank, _class_of(text), "" if text else f"{name} is empty")
    try:
        body = json.loads(text)
    except ValueError as error:
        return StoredLabel(rank, None, f"{name} is no JSON ({error})")
    held: dict[str, Any] = {key: body[key] for key in LABEL_KEYS if key in body} if isinstance(body, dict) else {}
    value = next((found for found in map(_class_of, held.values()) if found is not None), None)
    problem = ", ".join(f"{key}: {json.dumps(held[key])[:40]}" for key in held) or f"none of {', '.join(LABEL_KEYS)}"
    return StoredLabel(rank, value, "" if value is not None else f"{name} has {problem}")


def _class_of(value: Any) -> int | str | None:
    """A class number or a class name; None if the value is neither."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if _NUMBER.fullmatch(text) else text or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def class_numbers(labels: Sequence[int | str], names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Number the classes of all samples.

    Args:
        labels: class numbers, or class names, which are numbered in text order.
        names: names of the images, for messages.

    Returns:
        (n,) int64 class numbers, the class names in their order, and whether the labels were numbers.

    Raises:
        PruneError: numbers and names are mixed, or a number is no class number.
    """
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        other = next(i for i, label in enumerate(labels) if type(label) is not type(labels[0]))
        raise PruneError(
            f"data.root: {names[0]} has the label {labels[0]!r} and {names[other]} has {labels[other]!r}: either all "
            "labels are class numbers or all are class names"
        )
    if kinds == {int}:
        known = [label for label in labels if isinstance(label, int)]
        low, high = min(known), max(known)
        if low < 0:
            raise PruneError(
                f"data.root: {names[known.index(low)]} has the label {low}; class numbers start at 0. -1 often marks "
                "images whose classes are not published: leave such images out"
            )
        if high >= max(10_000, 2 * len(known)):
            raise PruneError(
                f"data.root: {names[known.index(high)]} has the label {high}, far more than the {len(known):,} images: "
                "it is no class number"
            )
        numbers = np.array(known, dtype=np.int64)
        return numbers, tuple(map(str, range(int(numbers.max()) + 1))), True
    classes = tuple(sorted({str(label) for label in labels}))
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[str(label)] for label in labels], dtype=np.int64), classes, False


def no_label(shard: object, name: str, key: str, problem: str, in_others: bool) -> PruneError:
    """The error for an image without a label.

    Args:
        shard: path of its shard.
        name: of its member.
        key: of its sample.
        problem: what its label's member holds; empty: it has none.
        in_others: whether other samples of the shard have labels.
    """
    lacks = problem or f"neither {PurePosixPath(key).name}.cls nor .json lies beside it"
    folder = PurePosixPath(name).parent.name
    then = "it is in no class folder"
    if in_others:
        then = "its folder is not taken, since other samples of the shard have labels" if folder else ""
    return PruneError(
        f"data.root: {name} in {shard} has no label: {lacks}{', and ' if then else ''}{then}. Give each sample a .cls "
        f"with its class, or a .json with it under {' or '.join(LABEL_KEYS[:3])}"
    )
