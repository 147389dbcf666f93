"""What the answers of networks show, by hand: lost and gained images, classes, confusions, calibration."""

import numpy as np
import pytest

from dist_prune.report import answers
from dist_prune.tasks.tallies import LOSS_UNIT

CLASSES = ["car", "bus", "tram"]


def units(*shares: float) -> np.ndarray:
    return (np.array(shares) * LOSS_UNIT).round().astype(np.int32)


def known(**more: np.ndarray) -> dict[str, np.ndarray]:
    """Seven images; the last one could not be read."""
    return {
        "labels": np.array([0, 0, 0, 1, 1, 2, 2], dtype=np.int32),
        "dense/predicted": np.array([0, 0, 0, 1, 0, 2, -1], dtype=np.int32),
        "dense/confidence": units(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0),
        "finetuned/predicted": np.array([0, 1, 1, 1, 1, 2, -1], dtype=np.int32),
        "finetuned/confidence": units(0.9, 0.5, 0.8, 0.9, 0.9, 0.9, 0),
        **more,
    }


def test_images_that_one_network_alone_gets_right():
    found = answers.summary(known(), CLASSES)
    assert found["answers"] == {"finetuned": {"lost": 2, "gained": 1, "images": 6}}
    assert found["classes"] == [
        {"class": "car", "number": 0, "images": 3, "dense": 3, "finetuned": 1},
        {"class": "bus", "number": 1, "images": 2, "dense": 1, "finetuned": 2},
        {"class": "tram", "number": 2, "images": 1, "dense": 1, "finetuned": 1},
    ]
    assert found["confused"] == [{"class": "car", "taken_for": "bus", "dense": 0, "finetuned": 2}]
    (loser,) = answers.losers(found["classes"])
    assert loser["class"] == "car" and answers.drop(loser) == pytest.approx(200 / 3)


def test_examples_are_the_surest_errors_that_are_new():
    assert answers.examples(0, known()) == [2, 1], "0.8 before 0.5; the image that stays right is none"
    assert answers.examples(1, known()) == []
    many = {
        "labels": np.zeros(9, dtype=np.int32), "dense/predicted": np.zeros(9, dtype=np.int32),
        "finetuned/predicted": np.ones(9, dtype=np.int32), "finetuned/confidence": units(*np.linspace(0.1, 0.9, 9)),
    }  # fmt: skip
    assert answers.examples(0, many) == [8, 7, 6]


def test_calibration_by_hand():
    """Ten images of confidence 0.8, of which six are right; ten of 1.0, all right: ECE = 10/20 * 0.2."""
    confidence, right = units(*[0.8] * 10, *[1.0] * 10), np.array([True] * 6 + [False] * 4 + [True] * 10)
    found = answers.calibration(confidence, right)
    assert found["ece"] == pytest.approx(10, abs=1e-5)
    assert [one["images"] for one in found["bins"]] == [10, 10]
    assert [one["accuracy"] for one in found["bins"]] == [60, 100]
    assert [one["confidence"] for one in found["bins"]] == pytest.approx([80, 100], abs=1e-5)


def test_calibration_of_bins_against_their_definition():
    rng = np.random.default_rng(0)
    shares, right = rng.random(500), rng.random(500) < 0.5
    confidence = units(*shares)
    expected = 0.0
    for number in range(answers.BINS):
        own = (confidence > number * LOSS_UNIT / answers.BINS) & (confidence <= (number + 1) * LOSS_UNIT / answers.BINS)
        if own.any():
            expected += own.sum() / 500 * abs(right[own].mean() - (confidence[own] / LOSS_UNIT).mean())
    assert answers.calibration(confidence, right)["ece"] == pytest.approx(100 * expected)


def test_the_sums_of_calibration_do_not_overflow():
    confidence = np.full(200_000, LOSS_UNIT, dtype=np.int32)
    assert answers.calibration(confidence, np.ones(200_000, dtype=bool))["ece"] == 0


def test_a_confusion_matrix_counts_images_that_could_be_read():
    found = answers.matrix(known()["labels"], known()["finetuned/predicted"], 3)
    assert found.tolist() == [[1, 2, 0], [0, 2, 0], [0, 0, 1]]


def test_networks_stand_in_the_order_of_reports():
    table = known(**{"pruned/predicted": np.zeros(7, dtype=np.int32), "pruned/confidence": units(*[0.5] * 7)})
    assert list(answers.summary(dict(sorted(table.items())), CLASSES)["calibration"]) == [
        "dense",
        "pruned",
        "finetuned",
    ]


def test_a_segmentation_s_classes_lose_iou():
    tables = {"dense/confusion": np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]]),
              "finetuned/confusion": np.array([[4, 6, 0], [0, 10, 0], [0, 0, 0]])}  # fmt: skip
    found = answers.summary(tables, CLASSES)
    assert list(found) == ["classes"]
    car, bus = found["classes"]
    assert (car["class"], car["pixels"], car["dense"], car["finetuned"]) == ("car", 10, 80, 40)
    assert (bus["dense"], bus["finetuned"]) == (pytest.approx(100 * 10 / 12), pytest.approx(100 * 10 / 16))
    assert [line["class"] for line in answers.losers(found["classes"])] == ["car", "bus"]


def test_a_run_without_answers_has_none():
    assert answers.summary({}, CLASSES) == {}
