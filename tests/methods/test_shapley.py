"""Shapley values on a network: the same integers for every world, more samples later, stopped and resumed, quirks."""

import json
from pathlib import Path

import pytest
import torch

from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.methods.shapley import estimators
from dist_prune.methods.shapley import method as shapley
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.support import tiny

THIRD = SelectionRequest(keep_ratio=0.6)


def shapley_with(**options) -> shapley.Shapley:
    return shapley.Shapley(shapley.Options(**{"samples": 3, **options}))


def bench_of(ranks: Communicator | None = None, record: Path | None = None):
    """Two groups of a small network: the rest is left alone."""
    bench = tiny.bench(tiny.network(), ranks)
    rest = [g.name for g in bench.graph.free if g.name not in ("layer1.0.conv1", "conv1")]
    bench.graph = bench.graph.exclude(rest)
    bench.record, bench.lineage = record, "this network"
    return bench


def scores_on(ranks: Communicator, estimator: str) -> dict[str, list]:
    found = shapley_with(estimator=estimator).score(bench_of(ranks))
    return {name: table.tolist() for name, table in found.items()}


@pytest.mark.parametrize("estimator", ["kernel", "permutation", "combin"])
def test_every_world_counts_the_same_integers(estimator, pool):
    found = [scores for world in (1, 2, 3) for scores in pool.run(world, scores_on, estimator)]
    assert all(scores == found[0] for scores in found)
    assert len({count for name, t in found[0].items() if "correct" in name for count in torch.tensor(t).flatten()}) > 1


@pytest.mark.parametrize("estimator", ["kernel", "permutation", "combin"])
def test_counts_are_those_of_the_network_without_the_channels(estimator):
    bench = bench_of()
    scores = shapley_with(estimator=estimator).score(bench)
    full, empty, images = scores["conv1:ends"].tolist()
    assert (full, images) == tiny.correct(bench)
    assert empty == tiny.correct(bench, {"conv1": range(16)})[0]
    correct = scores["conv1:correct"]
    if estimator == "permutation":
        orders = scores["conv1:orders"]
        assert correct.shape == (3, 15)
        gone = [orders[p, : j + 1].tolist() for p, j in ((0, 0), (1, 7), (2, 14))]
        found = [int(correct[p, j]) for p, j in ((0, 0), (1, 7), (2, 14))]
    else:
        off = scores["conv1:off"].bool()
        gone, found = [off[i].nonzero()[:, 0].tolist() for i in (0, 2)], [int(correct[i]) for i in (0, 2)]
    assert found == [tiny.correct(bench, {"conv1": off})[0] for off in gone]


def test_each_permutation_shares_out_the_whole_accuracy():
    method, bench = shapley_with(estimator="permutation"), bench_of()
    scores = method.score(bench)
    full, empty, images = scores["conv1:ends"].tolist()
    for first in (1, 2, 3):
        values, _, _ = method._estimate(scores, "conv1", first)
        assert float(values.sum()) == pytest.approx(100 * (full - empty) / images)
    shap = shapley_with(kernel="shap")
    values, _, _ = shap._estimate(shap.score(bench_of()), "conv1")
    assert float(values.sum()) == pytest.approx(100 * (full - empty) / images)


def counted(bench) -> list:
    """Counts of sets that the bench is asked for from now on."""
    asked, plain = [], bench.count_correct

    def spy(group, off, **how):
        asked.append(len(off))
        return plain(group, off, **how)

    bench.count_correct = spy
    return asked


@pytest.mark.parametrize("estimator", ["kernel", "permutation"])
def test_more_samples_later_are_the_samples_of_a_longer_run(estimator, tmp_path):
    file = tmp_path / "measured.jsonl"
    short = shapley_with(estimator=estimator, samples=2).score(bench_of(record=file))
    lines = file.read_text()
    bench = bench_of(record=file)
    asked = counted(bench)
    longer = shapley_with(estimator=estimator, samples=5).score(bench)
    fresh = shapley_with(estimator=estimator, samples=5).score(bench_of())
    assert all(torch.equal(longer[name], fresh[name]) for name in fresh)
    assert torch.equal(longer["conv1:correct"][:2], short["conv1:correct"])
    assert file.read_text().startswith(lines), "only ever appended"
    more = (5 - 2) * (15 if estimator == "permutation" else 1)
    assert 0 < sum(asked) <= 2 * (more + 4), "only what is new, in whole stacks"
    again = bench_of(record=file)
    asked = counted(again)
    shapley_with(estimator=estimator, samples=5).score(again)
    assert not asked


def test_a_torn_line_and_another_network_s_lines_are_not_read(tmp_path):
    file = tmp_path / "measured.jsonl"
    whole = shapley_with().score(bench_of(record=file))
    text = file.read_text()
    file.write_text(text[: len(text) // 2])  # cut off within a line
    bench = bench_of(record=file)
    asked = counted(bench)
    found = shapley_with().score(bench)
    assert asked
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert sum(1 for line in file.read_text().splitlines() if _is_json(line)) >= len(text.splitlines())
    other = bench_of(record=file)
    other.lineage = "another network"
    asked = counted(other)
    shapley_with().score(other)
    assert sum(asked) == 2 * (2 + 4), "everything is measured again"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def test_asked_to_stop_within_the_sampling_nothing_measured_is_lost(tmp_path, monkeypatch):
    file = tmp_path / "measured.jsonl"
    whole = shapley_with(samples=12).score(bench_of())
    polls = iter([[0]] * 3 + [[1]] * 9)
    with monkeypatch.context() as patched, pytest.raises(preemption.PreemptedError, match="shared jobs to do"):
        patched.setattr(preemption, "poll", lambda ranks: next(polls))
        shapley_with(samples=12).score(bench_of(record=file))
    kept = len(file.read_text().splitlines())
    bench = bench_of(record=file)
    asked = counted(bench)
    found = shapley_with(samples=12).score(bench)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert 0 < len(asked) == 2 + 6 - kept


def test_a_group_stops_as_soon_as_its_ranking_is_reliable():
    eager = shapley_with(estimator="permutation", samples=64, until="stable", reliability=0.3)
    scores = eager.score(bench_of())
    for name in ("conv1", "layer1.0.conv1"):
        count = len(scores[f"{name}:correct"])
        assert eager._estimate(scores, name)[2] >= 0.3 or count == 64
        assert count == 8 or eager._estimate(scores, name, count // 2)[2] < 0.3, "not earlier than it had to"
    assert min(len(scores[f"{n}:correct"]) for n in ("conv1", "layer1.0.conv1")) < 64
    assert {"samples", "until", "reliability"} == set(shapley.Options.refinable_options())
    assert "kernel" not in shapley.Options.score_options(), "one score file serves both regressions"


def test_tables_and_curves_for_the_report():
    method, bench = shapley_with(estimator="combin", k=2), bench_of()
    channels = bench.graph
    scores = method.score(bench)
    rows = {row["group"]: row for row in method.table(scores, channels, THIRD)}
    assert set(rows) == {"conv1", "layer1.0.conv1"}
    assert rows["conv1"]["samples"] == 1 + 16 + 120
    assert {"oracle_1", "oracle_2"} <= rows["conv1"].keys()
    assert "oracle_3" not in rows["conv1"]
    assert all(0 <= rows[name]["oracle_2"] <= 1 for name in rows)
    method = shapley_with(samples=20)
    curves = list(method.curves(method.score(bench_of()), channels, THIRD))
    assert [curve.group for curve in curves] == ["conv1", "layer1.0.conv1"]
    assert curves[0].x == (2.0, 4.0, 8.0, 16.0, 20.0)
    assert curves[0].y[-1] == pytest.approx(1)


def test_the_released_program_s_departures():
    plain, released = shapley_with(), shapley_with(fidelity="as_released")
    leak = shapley_with(quirks=("test_images",))
    assert (plain.calibration_split, released.calibration_split, leak.calibration_split) == (
        "held_out",
        "train",
        "test",
    )
    assert (plain.augmented, released.augmented) == (False, True)
    assert (plain.where, released.where) == ("consumed", "output")
    bench = bench_of()
    asked = []
    bench.count_correct = lambda group, off, **how: asked.append(how) or [0] * len(off)  # type: ignore[method-assign]
    released.score(bench)
    assert {how["where"] for how in asked} == {"output"}


def test_too_many_sets_are_refused_before_any_work():
    method, channels = shapley_with(estimator="combin", k=16), tiny.bench(tiny.network()).graph
    with pytest.raises(PruneError, match=r"method.k: .* lower method.k"):
        method.check(channels, SelectionRequest(keep_ratio=0.5))
    shapley_with(estimator="combin", k=2).check(channels, SelectionRequest(keep_ratio=0.5))
    with pytest.raises(PruneError, match=r"method.k: .* lower method.k"):
        method.score(tiny.bench(tiny.network()))


@pytest.mark.parametrize("adding", [False, True])
def test_steps_beyond_a_group_are_all_of_its_sets(adding):
    assert estimators.sizes_of(8, 10, adding) == range(9)
    rows = estimators.subsets(8, estimators.sizes_of(8, 10, adding))
    assert len(rows) == len(torch.unique(rows, dim=0)) == 2**8


def test_a_number_of_sets_at_the_threshold_is_said_before_any_work():
    channels = bench_of().graph  # two groups of 16
    (text,) = shapley_with(samples=17).cautions(channels)
    assert "method.samples: 17" in text
    assert "Take method.samples=34" in text
    assert shapley_with(samples=34).cautions(channels) == []
    assert shapley_with(samples=8).cautions(channels) == []
    assert shapley_with(samples=17, estimator="permutation").cautions(channels) == []
