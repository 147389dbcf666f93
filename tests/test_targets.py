"""Targets at the ends of whole runs: the tolerance gate and its exit code, a latency that is measured."""

import json

import pytest

from dist_prune import methods, reading
from dist_prune.run import run as whole_run
from dist_prune.runtime.machine import Machine
from tests.launch import PYTHON, report, run

WORDS = [
    "backbone.name=resnet8p_cifar", "train.epochs=1", "finetune.epochs=0", "score.images=20", "score.micro_batch=10",
    "report.latency_repeats=3", "report.latency_batches=[1]", "report.trackers=[]", "report.threads=1",
    "method.name=l1",
]  # fmt: skip


def test_a_missed_target_ends_with_its_own_code_after_everything_is_written(tmp_path):
    """Steps of 32 channels miss 0.55 by half a percent; bundle and report are there all the same."""
    coarse = ("select.round_to=32", "target.macs=0.55", "target.tolerance=0.001")
    code, output = run(PYTHON, tmp_path / "run", *WORDS, *coarse)
    assert code == 3, output
    assert (tmp_path / "run/export/model.safetensors").is_file()
    body = report(tmp_path / "run")
    event = next(event for event in body["events"] if event["event"] == "target missed")
    assert "steps of 32 (select.round_to)" in event["why"]
    assert event["why"] in output
    assert abs(body["achieved"]["macs"] / 0.55 - 1) > 0.001
    tolerant = whole_run(
        reading.load("quickstart", [*WORDS, *coarse[:2], "target.tolerance=null"], methods.options_of),
        tmp_path / "run", Machine.alone(),
    )  # fmt: skip
    assert tolerant == ""


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timed") / "run"

    def go(*words: str) -> dict:
        spec = reading.load("quickstart", [*WORDS, "target.macs=null", *words], methods.options_of)
        assert whole_run(spec, folder, Machine.alone()) == "", "a time is no reason to end with a code"
        return report(folder)

    return folder, go


def test_a_latency_target_is_measured_and_its_table_is_kept(timed):
    """Real times scatter, so the first target is one that any machine reaches in any mood."""
    folder, go = timed
    one = go("target.latency=0.97", "target.latency_batch=64")
    table = json.loads((folder / "latency.json").read_text())
    free = [group["name"] for group in one["plan"]["groups"] if group["name"] != "linear"]
    assert sorted(table["times"]) == sorted(free)
    for group in one["plan"]["groups"]:
        if group["name"] in table["times"]:
            widths = [width for width, _ in table["times"][group["name"]]]
            assert widths[-1] == group["width"]
            assert widths == sorted(set(widths))
    facts = next(
        json.loads(line)["facts"] for line in (folder / "ledger.jsonl").read_text().splitlines()
        if json.loads(line)["stage"] == "select"
    )  # fmt: skip
    assert one["target"] == {"latency": 0.97}
    assert one["achieved"]["latency"] == facts["latency"]["measured"] > 0
    assert (facts["latency"]["batch"], facts["latency"]["threads"]) == (64, 1)
    assert one["achieved"]["macs"] < 1
    # the table is read, not measured again: with every channel of a group at an equal price, half the time is in reach
    shares = len(table["times"])
    for group in one["plan"]["groups"]:
        if group["name"] in table["times"]:
            points = table["times"][group["name"]]
            table["times"][group["name"]] = [[w, 1 - (1 - w / group["width"]) / shares] for w, _ in points]
    (folder / "latency.json").write_text(json.dumps(table))
    before = (folder / "latency.json").stat().st_mtime_ns
    other = go("target.latency=0.5", "target.latency_batch=64")
    assert (folder / "latency.json").stat().st_mtime_ns == before, "measured once"
    assert other["plan"]["fingerprint"] != one["plan"]["fingerprint"]
