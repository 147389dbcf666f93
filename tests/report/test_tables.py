"""Texts of the report: measured times and events."""

import pytest

from dist_prune.report import tables


def body(**finetuned) -> dict:
    """As much of a report as its table needs, with written times."""
    common = {"top1": 90.0, "top5": 99.0, "loss": 0.5, "macs": 100, "params": 100, "size_bytes": 100}
    times = {"dense": 4.0, "pruned": 2.0, "finetuned": 2.0}
    out = {}
    for name, ms in times.items():
        figures = {"ms": ms, "ms_best": ms, "images_per_s": 1000 / ms, "reliable": True}
        out[name] = {**common, "latency": {"1": figures | (finetuned if name == "finetuned" else {})}}
    return out


def test_a_ratio_of_times_is_a_speed_up():
    rows = dict(tables.metric_rows(body()))
    assert rows["ms, batch 1"] == ["4.00", "2.00", "2.00"]
    assert rows["speed-up, batch 1"] == ["", "2.00x", "2.00x"], "faster is above 1"


def test_a_time_that_is_not_reliable_gets_no_ratio():
    rows = dict(tables.metric_rows(body(reliable=False)))
    assert rows["ms, batch 1"] == ["4.00", "2.00", "2.00"]
    assert rows["speed-up, batch 1"] == ["", "2.00x", "not reliable"]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"stage": "score", "event": "taken", "from": "runs/a"}, "score: taken from runs/a"),
        ({"stage": "train", "event": "resumed", "epoch": 2, "step": 4}, "(epoch 2, step 4)"),
        ({"stage": "prune", "event": "new weights", "layers": ["fc1", "fc2"]}, "released code does: fc1, fc2"),
        ({"stage": "finetune", "event": "not needed", "drop": 0.123456}, "only 0.1235 points of top-1"),
        ({"stage": "score", "event": "12 {odd} images", "why": "{from}"}, "score: 12 {odd} images (why {from})"),
        ({"stage": "score", "event": "taken"}, "score: taken"),  # an older ledger lacks the detail
    ],
)
def test_events_are_sentences(event, text):
    assert tables.event_text(event).endswith(text)
