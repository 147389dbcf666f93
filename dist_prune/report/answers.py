"""What the answers of a run's networks show beside their figures: the classes that lost, who took them, calibration.

All counts are sums of integers over the test images. Images that could not be read have the answer -1 and do not count.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dist_prune.report.tables import KINDS
from dist_prune.tasks.tallies import LOSS_UNIT

BINS = 15  # of confidence, of equal width (Guo et al. 2017, section 2)
LOSERS = 6  # classes that a page shows
PAIRS = 12  # pairs of confused classes that a page shows
EXAMPLES = 3  # images of each of them
MATRIX = 16  # most classes of a confusion matrix on a page


def summary(answers: Mapping[str, np.ndarray], classes: Sequence[str]) -> dict[str, Any]:
    """What report.json says of the answers.

    Args:
        answers: The arrays of answers.safetensors.
        classes: Names of the classes.

    Returns:
        Of a classification ``answers`` (network -> images that only the dense network got right, ``lost``, that only it
        got right, ``gained``, ``images``), ``calibration`` (network -> ``ece`` in percent, ``bins``), ``classes`` (see
        ``class_lines``) and ``confused``. Of a segmentation ``classes``. Nothing where the run has no answers.
    """
    networks = networks_of(answers, "predicted")
    if "dense" in networks and "labels" in answers:
        labels = answers["labels"]
        right = {name: answers[f"{name}/predicted"] == labels for name in networks}
        seen = np.logical_and.reduce([answers[f"{name}/predicted"] >= 0 for name in networks])
        return {
            "answers": {
                name: _changes(right["dense"][seen], right[name][seen]) for name in networks if name != "dense"
            },
            "calibration": {
                name: calibration(answers[f"{name}/confidence"][seen], right[name][seen]) for name in networks
            },
            "classes": class_lines(labels[seen], {name: hit[seen] for name, hit in right.items()}, classes),
            "confused": confused(labels, answers, networks, classes),
        }
    tables = {name: answers[f"{name}/confusion"] for name in networks_of(answers, "confusion")}
    return {"classes": overlap_lines(tables, classes)} if "dense" in tables else {}


def networks_of(answers: Mapping[str, np.ndarray], what: str) -> list[str]:
    """The networks whose ``what`` is known, in the order of reports."""
    return [kind for kind in KINDS if f"{kind}/{what}" in answers]


def _changes(dense: np.ndarray, other: np.ndarray) -> dict[str, int]:
    lost, gained = int((dense & ~other).sum()), int((~dense & other).sum())
    return {"lost": lost, "gained": gained, "images": len(dense)}


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """How far confidence and accuracy are apart (Guo et al. 2017, equation 3).

    Args:
        confidence: (n,) integers in units of 1 / LOSS_UNIT.
        right: (n,) bool.

    Returns:
        ``ece``: the expected calibration error in percent, the mean over the images of the distance between
        accuracy and mean confidence of their bin. ``bins``: ``images``, ``confidence`` and ``accuracy`` in percent, of
        those that are not empty.
    """
    numbers = np.clip((confidence.astype(np.int64) * BINS - 1) // LOSS_UNIT, 0, BINS - 1)  # bins are open below
    counts = np.bincount(numbers, minlength=BINS)
    hits = np.bincount(numbers[right], minlength=BINS)
    sums = np.zeros(BINS, dtype=np.int64)
    np.add.at(sums, numbers, confidence.astype(np.int64))
    gap = sum(abs(int(hit) * LOSS_UNIT - int(total)) for hit, total in zip(hits, sums, strict=True))
    return {
        "ece": 100 * gap / LOSS_UNIT / max(1, len(right)),
        "bins": [
            {"images": int(n), "confidence": 100 * int(total) / LOSS_UNIT / int(n), "accuracy": 100 * int(hit) / int(n)}
            for n, hit, total in zip(counts, hits, sums, strict=True)
            if n
        ],
    }


def class_lines(labels: np.ndarray, right: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each class that has an image: ``class``, ``images``, and its images that each network gets right.

    Args:
        labels: (n,) class numbers.
        right: Network -> (n,) bool.
        classes: Names of the classes.
    """
    count = len(classes)
    images = np.bincount(labels, minlength=count)
    hits = {name: np.bincount(labels[hit], minlength=count) for name, hit in right.items()}
    return [
        {
            "class": classes[k],
            "number": k,
            "images": int(images[k]),
            **{name: int(hit[k]) for name, hit in hits.items()},
        }
        for k in range(count)
        if images[k]
    ]


def overlap_lines(tables: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each class of a segmentation: ``class``, ``pixels``, and the IoU in percent of each network.

    Args:
        tables: Network -> (classes, classes) pixels by class of the mask (rows) and predicted class.
        classes: Names of the classes.
    """
    lines = []
    for k, name in enumerate(classes):
        unions = {kind: int(t[k].sum() + t[:, k].sum() - t[k, k]) for kind, t in tables.items()}
        pixels = int(tables["dense"][k].sum())
        if pixels and all(unions.values()):
            ious = {kind: 100 * int(t[k, k]) / unions[kind] for kind, t in tables.items()}
            lines.append({"class": name, "number": k, "pixels": pixels, **ious})
    return lines


def confused(
    labels: np.ndarray, answers: Mapping[str, np.ndarray], networks: Sequence[str], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """The pairs of classes whose confusion grew most: ``class``, ``taken_for``, images of each network that are so.

    Args:
        labels: (n,) class numbers.
        answers: The arrays of answers.safetensors.
        networks: Those that answered.
        classes: Names of the classes.
    """
    last = "finetuned" if "finetuned" in networks else networks[-1]
    counts: dict[tuple[int, int], dict[str, int]] = {}
    for name in networks:
        predicted = answers[f"{name}/predicted"]
        wrong = (predicted >= 0) & (predicted != labels)
        pairs, numbers = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
        for (true, other), count in zip(pairs.T.tolist(), numbers.tolist(), strict=True):
            counts.setdefault((true, other), {})[name] = count
    grown = sorted(counts.items(), key=lambda item: (item[1].get("dense", 0) - item[1].get(last, 0), item[0]))
    return [
        {"class": classes[true], "taken_for": classes[other], **{name: found.get(name, 0) for name in networks}}
        for (true, other), found in grown[:PAIRS]
        if found.get(last, 0) > found.get("dense", 0)
    ]


def matrix(labels: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """The confusion matrix of images: (count, count) int64, rows by label, columns by predicted class."""
    seen = predicted >= 0
    return np.bincount(labels[seen].astype(np.int64) * count + predicted[seen], minlength=count * count).reshape(
        count, count
    )


def losers(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The classes that lost most from the dense to the finetuned network, in points, the largest loss first.

    Args:
        lines: ``classes`` of report.json.
    """
    lost = [line for line in lines if drop(line) > 0]
    return sorted(lost, key=lambda line: (-drop(line), line["number"]))[:LOSERS]


def drop(line: Mapping[str, Any]) -> float:
    """Points that a class lost: of its accuracy, or of its IoU."""
    change = line["dense"] - line["finetuned"]
    return 100 * change / line["images"] if "images" in line else change


def examples(number: int, answers: Mapping[str, np.ndarray]) -> list[int]:
    """Images of a class that the dense network gets right and the finetuned one does not, the surest errors first.

    Args:
        number: The class.
        answers: The arrays of answers.safetensors.

    Returns:
        Positions of at most ``EXAMPLES`` images.
    """
    labels, before, after = (answers[name] for name in ("labels", "dense/predicted", "finetuned/predicted"))
    found = np.flatnonzero((labels == number) & (before == number) & (after != number) & (after >= 0))
    order = np.argsort(-answers["finetuned/confidence"][found].astype(np.int64), kind="stable")
    return found[order][:EXAMPLES].tolist()
