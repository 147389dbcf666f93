"""The head of a report: what it says of target, figure and speed, and when it says that it cannot know."""

import numpy as np
import pytest

from dist_prune.report import headline, tables
from tests.report.test_tables import body as figures


def body(**more) -> dict:
    """A report whose network keeps half of its MACs."""
    untrained = {"epochs": 0}
    found = figures() | {
        "events": [], "target": {"macs": 0.5}, "achieved": {"macs": 0.49}, "seed": 0,
        "recipe": {"backbone": {"name": "net"}, "method": {"name": "l1"}, "train": untrained, "finetune": untrained},
    }  # fmt: skip
    for kind in ("dense", "pruned", "finetuned"):
        found[kind] = {**found[kind], "images": 10_000}
    return found | more


def texts(found: dict) -> list[tuple[str, str]]:
    return [(sentence.level, sentence.text) for sentence in headline.verdict(found)]


def test_a_target_that_is_met():
    assert texts(body())[0] == ("good", "The target is met: 49.0% of the MACs left, at most 50.0% asked.")


def test_a_target_that_is_met_within_its_tolerance():
    assert texts(body(achieved={"macs": 0.505}))[0][1].startswith("The target is met within its tolerance: 50.5%")


def test_a_target_that_is_missed():
    missed = {"stage": "select", "event": "target missed", "why": "60.0% of the MACs are left, 50.0% were asked"}
    assert texts(body(events=[missed], achieved={"macs": 0.6}))[0] == (
        "bad", "The target is missed: 60.0% of the MACs are left, 50.0% were asked.",
    )  # fmt: skip


def test_a_threshold_has_no_target():
    level, text = texts(body(target={}, achieved={"macs": 0.7, "channels": 0.8}))[0]
    assert (level, text) == (
        "plain",
        "No share of a cost was asked for. Left: 70.0% of the MACs, 80.0% of the channels.",
    )


def test_a_plan_that_removes_nothing():
    assert texts(body(achieved={"macs": 1.0}))[0][0] == "bad"


def change(dense: float, finetuned: float, **more) -> tuple[str, str]:
    found = body(**more)
    found["dense"] |= {"top1": dense}
    found["finetuned"] |= {"top1": finetuned}
    return texts(found)[1]


def test_a_change_within_the_noise_of_the_images_is_called_so():
    level, text = change(90.0, 89.5)
    assert level == "plain" and text.endswith("1.2 standard errors: these images cannot tell the two apart.")
    level, text = change(90.0, 80.0)
    assert level == "doubt" and text.startswith("top-1 falls by 10.00 points (90.00 % dense, 80.00 % at the end)")
    assert change(90.0, 95.0)[0] == "good"
    assert change(90.0, 90.0) == ("good", "top-1 is that of the dense network (90.00 % dense, 90.00 % at the end).")
    assert change(90.0, None)[0] == "bad"


def test_the_error_of_a_change_is_that_of_paired_answers():
    rng = np.random.default_rng(0)
    dense = rng.random(1000) < 0.9
    other = np.where(rng.random(1000) < 0.05, ~dense, dense)
    counts = {"lost": int((dense & ~other).sum()), "gained": int((~dense & other).sum()), "images": 1000}
    found = body(answers={"finetuned": counts})
    difference = other.astype(float) - dense
    assert headline.change_error(found, "finetuned") == pytest.approx(100 * difference.std() / 1000**0.5)
    alone = [tables.standard_error(found, kind, "top1") for kind in ("dense", "finetuned")]
    assert headline.change_error(body(), "finetuned") == pytest.approx(np.hypot(*alone))


def test_figures_that_are_no_shares_of_images_have_no_error():
    task = {"name": "segmentation", "titles": {"miou": "mIoU %"}, "primary": "miou", "higher_is_better": True}
    found = body(task=task)
    for kind, value in (("dense", 30.0), ("pruned", 10.0), ("finetuned", 25.0)):
        found[kind] |= {"miou": value}
    assert tables.standard_error(found, "dense", "miou") is None
    assert texts(found)[1] == ("doubt", "mIoU falls by 5.00 points (30.00 % dense, 25.00 % at the end).")
    assert next(card for card in headline.cards(found) if card.title == "mIoU %").value == "30.00 → 10.00 → 25.00"


def test_a_lower_figure_may_be_better():
    task = {"name": "regression", "titles": {"mae": "MAE"}, "primary": "mae", "higher_is_better": False}
    found = body(task=task)
    found["dense"] |= {"mae": 0.5}
    found["finetuned"] |= {"mae": 0.4}
    assert texts(found)[1][0] == "good"


def test_speed_is_said_only_where_it_is_known():
    assert texts(body())[2] == ("good", "It runs 2.00 times as fast as the dense network on cpu at batch 1.")
    found = body()
    found["finetuned"]["latency"]["1"] |= {"reliable": False}
    assert texts(found)[2][0] == "doubt" and "not reliable" in texts(found)[2][1]
    assert "?" in {card.value for card in headline.cards(found)}
    found = body()
    found["finetuned"]["latency"]["1"] |= {"ms": 8.0, "ms_best": 8.0}
    assert texts(found)[2] == ("doubt", "It is slower than the dense network on cpu at batch 1 (0.50x).")


def test_what_the_test_images_chose_and_warnings_are_in_doubt():
    found = body(events=[{"stage": "train", "event": "WARNING: the labels are shuffled"}])
    found["recipe"]["train"] = {"epochs": 1, "selection": "test"}
    doubts = [text for level, text in texts(found) if level == "doubt"]
    assert "the labels are shuffled" in doubts
    assert any("selected on the test images" in text for text in doubts)


def test_levels_have_signs_beside_their_colours():
    assert len(set(headline.SIGNS.values())) == 4
