"""Targets at the ends of whole runs: the tolerance gate and its exit code, a latency that is measured."""

import json

import pytest

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.run import run as whole_run
from dist_prune.scoring import network_times
from tests.support.launch import PYTHON, report, run

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
        loading.load("quickstart", [*WORDS, *coarse[:2], "target.tolerance=null"], methods.options_of),
        tmp_path / "run", DistributedEnvironment.single_process(),
    )  # fmt: skip
    assert tolerant == ""


def events(body: dict, name: str) -> list[dict]:
    return [event for event in body["events"] if event["event"] == name]


def test_a_target_of_channels_is_held_to_its_tolerance_too(tmp_path):
    """In steps of 32 channels no network keeps just the share that was asked for."""
    coarse = ("target.macs=null", "target.channels=0.55", "select.round_to=32", "target.tolerance=0.001")
    missed = whole_run(
        loading.load("quickstart", [*WORDS, *coarse], methods.options_of),
        tmp_path / "run",
        DistributedEnvironment.single_process(),
    )
    assert missed.startswith("target.channels: 0.55 was asked for")
    assert events(report(tmp_path / "run"), "target missed")[0]["why"] == missed


def clock(monkeypatch, fixed: float, good=lambda models: True) -> list[int]:
    """A machine whose times are written down: ``fixed`` of the dense time, and the rest by the number of weights."""
    asked = []

    def latency(models, shape, batches, repeats, device, threads, timer=None, rounds=3):
        asked.append(len(models))
        size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        times = {name: fixed + (1 - fixed) * size[name] / size[""] for name in models}
        return {
            name: {str(b): {"ms": ms, "ms_best": ms, "reliable": good(models)} for b in batches}
            for name, ms in times.items()
        }

    monkeypatch.setattr(network_times, "measure_latency", latency)
    return asked


def go(folder, *words: str) -> tuple[str, dict]:
    """(why the target was missed, the report)"""
    spec = loading.load("quickstart", [*WORDS, "target.macs=null", *words], methods.options_of)
    return whole_run(spec, folder, DistributedEnvironment.single_process()), report(folder)


def facts(folder) -> dict:
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "select"][-1]["facts"]["latency"]


def test_a_latency_target_is_met_by_measured_networks_and_its_table_is_kept(monkeypatch, tmp_path):
    folder, asked = tmp_path / "run", clock(monkeypatch, 0.3)
    missed, one = go(folder, "target.latency=0.6", "target.latency_batch=64")
    assert missed == ""
    table = json.loads((folder / "latency.json").read_text())
    free = [group["name"] for group in one["plan"]["groups"] if group["name"] != "linear"]
    assert sorted(table["times"]) == sorted(free)
    for group in one["plan"]["groups"]:
        if group["name"] in table["times"]:
            widths = [width for width, _ in table["times"][group["name"]]]
            assert widths[-1] == group["width"]
            assert widths == sorted(set(widths))
    found = facts(folder)
    assert one["target"] == {"latency": 0.6}
    assert one["achieved"]["latency"] == found["measured"] == pytest.approx(0.6, rel=0.05)
    assert found["reliable"] and [found["predicted"], found["measured"]] in found["tried"]
    assert (found["batch"], found["threads"]) == (64, 1)
    assert one["achieved"]["macs"] < 1
    # the table is read, not measured again; whole networks are
    before, calls = (folder / "latency.json").stat().st_mtime_ns, len(asked)
    missed, other = go(folder, "target.latency=0.5", "target.latency_batch=64")
    assert missed == "" and other["achieved"]["latency"] == pytest.approx(0.5, rel=0.05)
    assert (folder / "latency.json").stat().st_mtime_ns == before, "measured once"
    assert calls < len(asked) <= calls + 7
    assert other["plan"]["fingerprint"] != one["plan"]["fingerprint"]


def test_a_method_that_draws_what_it_chose_knows_the_times_again(monkeypatch, tmp_path):
    """The graph's pictures search for the network within the target once more: they need what was measured."""
    clock(monkeypatch, 0.3)
    missed, body = go(tmp_path / "run", "method.name=graph", "target.latency=0.6")
    assert missed == ""
    assert body["achieved"]["latency"] == pytest.approx(0.6, rel=0.05)
    assert "Similarity of channels" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("name", ["entropy", "chip"])
def test_methods_with_a_search_of_their_own(monkeypatch, tmp_path, name):
    clock(monkeypatch, 0.3)
    missed, body = go(tmp_path / "run", f"method.name={name}", "target.latency=0.6")
    assert missed == "" or "none is nearer" in missed
    assert body["achieved"]["latency"] == pytest.approx(0.6, rel=0.1)


def test_a_table_that_promises_too_much_costs_measurements_and_no_miss(monkeypatch, tmp_path):
    """A quarter of the dense time too little in every group: by the table alone hardly anything has to go."""
    folder = tmp_path / "run"
    clock(monkeypatch, 0.3)
    go(folder, "target.latency=0.95")
    table = json.loads((folder / "latency.json").read_text())
    for points in table["times"].values():
        points[:-1] = [[width, share - 0.25] for width, share in points[:-1]]
    (folder / "latency.json").write_text(json.dumps(table))
    missed, body = go(folder, "target.latency=0.6")
    assert missed == ""
    assert body["achieved"]["latency"] == pytest.approx(0.6, rel=0.05)


def test_a_latency_out_of_reach_says_what_is_reachable(monkeypatch, tmp_path):
    clock(monkeypatch, 0.8)
    with pytest.raises(
        PruneError, match=r"target\.latency: 0\.5 cannot be reached on this device.*range is 0\.8\d+ to 1"
    ):
        go(tmp_path / "run", "target.latency=0.5")


def test_a_missed_latency_is_an_event_and_a_code(monkeypatch, tmp_path):
    """Steps of 32 channels leave nothing near what was asked for."""
    clock(monkeypatch, 0.0)
    missed, body = go(tmp_path / "run", "target.latency=0.8", "select.round_to=32", "target.latency_tolerance=0.001")
    assert missed.startswith("target.latency: 0.8 was asked for, 0.")
    assert "steps of 32 (select.round_to)" in missed and "the fastest takes" in missed
    assert events(body, "target missed")[0]["why"] == missed
    assert (tmp_path / "run/export/model.safetensors").is_file()
    again, _ = go(tmp_path / "run", "target.latency=0.8", "select.round_to=32", "target.latency_tolerance=0.001")
    assert again == missed, "a second start does not make it good"


def test_times_that_are_not_reliable_meet_no_target(monkeypatch, tmp_path):
    clock(monkeypatch, 0.3, good=lambda models: False)
    missed, body = go(tmp_path / "run", "target.latency=0.6")
    assert "that time is not reliable" in missed and "report.latency_repeats (it was 3)" in missed
    assert events(body, "target missed")
    clock(monkeypatch, 0.3)  # the machine has calmed down
    missed, body = go(tmp_path / "run", "target.latency=0.6", "report.latency_repeats=4")
    assert missed == "" and not events(body, "target missed")


def test_a_real_latency(tmp_path):
    """The real clock on a tiny network, in any mood: without a tolerance every time is taken, and told."""
    missed, body = go(
        tmp_path / "run", "target.latency=0.9", "target.latency_tolerance=null", "target.latency_batch=64"
    )
    assert missed == "", "no network is refused"
    found = facts(tmp_path / "run")
    assert body["achieved"]["latency"] == found["measured"] > 0
    assert len(found["tried"]) >= 2


def test_criteria_are_not_compared_at_a_target_that_is_measured(tmp_path):
    with pytest.raises(PruneError, match=r"score\.compare: .*target\.latency"):
        go(tmp_path / "run", "target.latency=0.9", "score.compare=[l1,l2]")
