"""Times of cut networks: beside the dense one, recorded, by one rank, the same widths once; left out where asked."""

import csv
import json

import pytest
import torch
from torch import nn

from dist_prune import methods
from dist_prune.analysis import cut_times
from dist_prune.analysis.cut_times import CutTimes, times_of_curves
from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.run import run as run_stages

WORDS = [
    "backbone.name=resnet8p_cifar", "train.epochs=1", "score.images=50", "report.trackers=[]", "evaluate.batch=17",
    "method.name=l1", "report.latency_batches=[4]", "report.latency_repeats=3",
]  # fmt: skip
SCORED = ("dense.safetensors", "round_1/scores.safetensors", "ledger.jsonl", "recipe.yaml", "stage_started.json")


class PretendClock:
    """Stands for measure_latency: a network takes its number of weights in microseconds."""

    def __init__(self, doubted: float = 0.0):
        self.calls: list[list[str]] = []
        self.doubted = doubted

    def __call__(self, models, shape, batches, repeats, device, threads, timer=None, rounds=3, tracker=None):
        self.calls.append(list(models))
        found = {}
        for name, model in models.items():
            with torch.no_grad():
                model(torch.zeros(1, *shape, device=device))
            ms = sum(parameter.numel() for parameter in model.parameters()) / 1000
            doubt = name != "dense" and ms < self.doubted
            figures = {"ms": ms, "ms_best": ms, "reliable": not doubt, **({"why": "it was disturbed"} if doubt else {})}
            found[name] = {str(batch): figures for batch in batches}
        return found


@pytest.fixture
def clock(monkeypatch):
    pretend = PretendClock()
    monkeypatch.setattr(cut_times, "measure_latency", pretend)
    return pretend


def timed(ranks: Communicator, folder, widths) -> CutTimes:
    """The verb's times on the ranks of a pool."""
    found = []
    recipe = loading.load("quickstart", WORDS, methods.options_of)
    environment = DistributedEnvironment(torch.device("cpu"), ranks)
    run_stages(recipe, folder, environment, until="score", then=lambda c: found.append(times_of_curves(c, widths)))
    return found[0]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("times") / "run"
    recipe = loading.load("quickstart", WORDS, methods.options_of)
    run_stages(recipe, folder, DistributedEnvironment(torch.device("cpu"), Communicator()), until="score")
    return folder


def test_each_network_is_timed_once_beside_the_dense_one(scored, clock):
    record = scored / cut_times.RECORD
    record.unlink(missing_ok=True)
    times = timed(Communicator(), scored, {"conv1": [12, 4, 12], "layer1.0.conv1": [8]})
    assert clock.calls == [["dense", "12", "4"], ["dense", "8"]]
    assert times.place["batch"] == 4 and times.place["device"] == "cpu" and times.place["machine"] is not None
    few, more = times.facts("conv1", "4"), times.facts("conv1", "12")
    assert few["ms"] < more["ms"] < more["dense_ms"] == few["dense_ms"]
    assert few["speedup"] == pytest.approx(few["dense_ms"] / few["ms"]) and few["reliable"]
    kept = record.read_text()
    again = timed(Communicator(), scored, {"conv1": [12, 4], "layer1.0.conv1": [8]})
    assert len(clock.calls) == 2 and record.read_text() == kept, "recorded ones are not measured again"
    assert again == times
    timed(Communicator(), scored, {"conv1": [12, 2]})
    assert clock.calls[2:] == [["dense", "2"]], "a new ratio alone"


def test_times_in_doubt_are_no_speed_up(scored, clock):
    (scored / cut_times.RECORD).unlink(missing_ok=True)
    clock.doubted = 10.0**9
    facts = timed(Communicator(), scored, {"conv1": [4]}).facts("conv1", "4")
    assert facts["speedup"] is None and not facts["reliable"] and facts["why"] == "it was disturbed"
    assert facts["ms"] < facts["dense_ms"]
    (scored / cut_times.RECORD).unlink()


def test_one_rank_measures_for_all(scored, pool, tmp_path):
    for name in SCORED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((scored / name).read_bytes())
    first, second = pool.run(2, timed, tmp_path, {"conv1": [4]})
    assert first == second
    assert len((tmp_path / cut_times.RECORD).read_text().splitlines()) == 2, "the pace, and one network"


def test_the_batch_size_is_the_largest_that_is_cheap(monkeypatch):
    """A second an image is too slow for all but the smallest one, and for more than the least passes."""

    class Slow(nn.Module):
        def __init__(self, seconds: float):
            super().__init__()
            self.seconds, self.now = seconds, 0.0

        def forward(self, x):
            self.now += self.seconds * len(x)
            return x

    def pace(seconds: float) -> tuple[int, int]:
        network = Slow(seconds)
        monkeypatch.setattr(cut_times.time, "perf_counter", lambda: network.now)
        return cut_times._pace(network, (1, 2, 2), (1, 32), 10, 30, torch.device("cpu"), 1)

    assert pace(1.0) == (1, cut_times.LEAST)
    assert pace(1e-5) == (32, 30)


def test_the_verb_keeps_them_in_its_files(scored, clock, capsys):
    words = ["ratio-curves", "quickstart", "--run-dir", str(scored), "--ratios", "0.5,0.25", "--images", "40", *WORDS]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "speed-up: dense over cut, batch 4 on cpu" in said
    body = json.loads((scored / "ratio_curves.json").read_text())
    rows = list(csv.DictReader((scored / "ratio_curves.csv").read_text().splitlines()))[1:]
    points = [point for group in body["groups"] for point in group["points"]]
    assert body["times"]["batch"] == 4
    assert [float(row["speedup"]) for row in rows] == [point["speedup"] for point in points]
    assert all(point["speedup"] > 1 for point in points)
    calls = len(clock.calls)
    assert main([*words, "--no-times"]) == 0
    assert "speed-up: not measured (--no-times)" in capsys.readouterr().out
    assert len(clock.calls) == calls
    body = json.loads((scored / "ratio_curves.json").read_text())
    assert "times" not in body and "ms" not in body["groups"][0]["points"][0]
    assert "speedup" not in (scored / "ratio_curves.csv").read_text()
    assert "not measured" in (scored / "ratio_curves.html").read_text()


def test_score_many_times_each_criterion_s_network(tmp_path, clock, capsys):
    """Networks of equal widths are timed once, and have one speed-up."""
    folder = tmp_path / "run"
    words = ["score-many", "quickstart", "--methods", "l1,random", "--run-dir", str(folder), *WORDS]
    assert main([*words, "target.macs=0.6", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    networks = {row["ms"] for row in table}
    assert sum(len(call) - 1 for call in clock.calls) == len(networks)
    assert all(row["speedup"] == row["dense_ms"] / row["ms"] > 1 for row in table)
    saved = json.loads((folder / "criteria_times.json").read_text())
    assert saved["criteria"]["l1"]["ms"] == table[0]["ms"] and saved["place"]["batch"] == 4
    assert "largest speed-up" in (folder / "criteria.html").read_text()
    assert main([*words, "target.macs=0.6", "--no-times"]) == 0
    assert "speed-up: not measured (--no-times)" in capsys.readouterr().out
    assert "not measured" in (folder / "criteria.html").read_text()
