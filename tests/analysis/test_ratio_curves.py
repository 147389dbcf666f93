"""Ratio curves: a masked group is a cut one, any number of ranks and any kill give the same figures."""

import contextlib
import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_prune import methods
from dist_prune.analysis import cut_judges, ratio_curves
from dist_prune.analysis.ratio_curves import RatioCurve, RatioCurves, RatioPoint, RatioRequest, measure
from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.run import run as run_stages
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import tiny
from tests.support.launch import ROOT, run

WORDS = [
    "backbone.name=resnet8p_cifar", "train.epochs=1", "score.images=50", "report.trackers=[]", "evaluate.batch=17",
    "method.name=l1",
]  # fmt: skip
ASKED = RatioRequest((0.8, 0.3), 60)


def curves(
    ranks: Communicator, folder: Path, words: list[str], asked: RatioRequest = ASKED, stop_after: int = 0
) -> RatioCurves:
    """The verb's work on the ranks of a pool; ``stop_after`` ends it behind so many jobs of a rank."""
    found = []
    spec = loading.load("quickstart", words, methods.options_of)

    def then(context) -> None:
        if not stop_after:
            found.append(measure(context, asked))
            return
        real, done = cut_judges.count_metrics, []

        def judged(logits, labels):
            done.append(1)
            if len(done) > stop_after:
                raise RuntimeError("killed")
            return real(logits, labels)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RuntimeError):
            patch.setattr(cut_judges, "count_metrics", judged)
            measure(context, asked)

    run_stages(spec, folder, DistributedEnvironment(torch.device("cpu"), ranks), until="score", then=then)
    return found[0] if found else RatioCurves(RatioPoint(1, 1, 1, 0, 0), (), 0, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ratios")


@pytest.fixture(scope="module")
def alone(folder):
    """On one rank; the dense network and the scores lie in ``folder / "1"``."""
    return curves(Communicator(), folder / "1", WORDS)


def test_the_same_for_every_number_of_ranks(alone, folder, pool):
    for world in (2, 3):
        place = folder / str(world)
        place.mkdir()
        scored = ("dense.safetensors", "round_1/scores.safetensors", "ledger.jsonl", "recipe.yaml")
        for name in (*scored, "stage_started.json"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes((folder / "1" / name).read_bytes())
        assert pool.run(world, curves, place, WORDS) == [alone] * world
        jobs = [json.loads(line)["job"] for line in (place / ratio_curves.RECORD).read_text().splitlines()]
        assert len(jobs) == len({tuple(job) for job in jobs}) == 1 + 2 * len(alone.lines), (
            "every job once, over all ranks"
        )


def test_a_kill_loses_nothing(alone, folder, pool):
    """Killed in its first round by a real exception; the same command does the rest, and only that."""
    (folder / "1" / ratio_curves.RECORD).rename(folder / "record")
    batches = 4  # of 17, of 60 images
    curves(Communicator(), folder / "1", WORDS, stop_after=3 * batches)
    kept = (folder / "1" / ratio_curves.RECORD).read_text()
    assert 0 < len(kept.splitlines()) < 1 + 2 * len(alone.lines)
    assert curves(Communicator(), folder / "1", WORDS) == alone
    now = (folder / "1" / ratio_curves.RECORD).read_text()
    assert now.startswith(kept), "what was done stays as it was"
    assert sorted(now.splitlines()) == sorted((folder / "record").read_text().splitlines())
    more = curves(Communicator(), folder / "1", WORDS, RatioRequest((0.8, 0.5, 0.3), 60))
    added = (folder / "1" / ratio_curves.RECORD).read_text()
    assert len(added.splitlines()) == len(now.splitlines()) + len(alone.lines), "a new ratio: one job a group"
    assert [line.points[::2] for line in sorted(more.lines, key=lambda one: one.group)] == [
        line.points for line in sorted(alone.lines, key=lambda one: one.group)
    ]


def test_masked_is_cut(alone, folder):
    """Real surgery on the same images gives the same top-1, and the loss to rounding."""
    seen = []

    def then(context) -> None:
        channels, scores = context.networks.graph, context.read_tensors("round_1/scores.safetensors")
        feed, ids, _ = ratio_curves.evaluation_images(context, ASKED)
        assert set(ids) <= set(context.images.holdout()[0])
        assert len(ids) == 60
        for line in alone.lines:
            for point in line.points:
                gone = ratio_curves.removed_channels(
                    context.method, scores, channels, line.group, point.ratio, context.selection
                )
                assert len(gone) == line.width - point.kept == line.width - round(line.width * point.ratio)
                plan = Plan({line.group: gone}, {group.name: group.width for group in channels.groups})
                model = context.networks.load_dense().eval()
                surgeon.apply_plan(model, channels, plan)
                figures = evaluate(model, feed, 17, Communicator(), Tracker(False), ids=ids)
                assert point.figure == figures["top1"]
                assert point.loss == pytest.approx(figures["loss"], rel=1e-5)
                assert point.macs == cost.macs(channels, plan.counts) / cost.macs(channels)
                seen.append(gone)
        dense = evaluate(context.networks.load_dense(), feed, 17, Communicator(), Tracker(False), ids=ids)
        assert (alone.dense.figure, alone.dense.loss) == (dense["top1"], pytest.approx(dense["loss"], rel=1e-6))

    spec = loading.load("quickstart", WORDS, methods.options_of)
    run_stages(
        spec, folder / "1", DistributedEnvironment(torch.device("cpu"), Communicator()), until="score", then=then
    )
    assert len(set(seen)) == len(seen) == 2 * len(alone.lines)


@pytest.mark.parametrize("name", ["l1", "graph", "random", "entropy", "sensitivity"])
def test_every_kind_of_method_can_be_asked_for_one_group(name):
    """Rankings keep what is asked for, the one with a threshold at most that."""
    bench = tiny.bench(tiny.network())
    kind = methods.find(name)
    method = kind(kind.Options.model_validate({"epochs": 1} if name == "sensitivity" else {}))
    scores, channels = method.score(bench), method.prunable(bench.graph)
    for group in channels.free:
        gone = [
            ratio_curves.removed_channels(
                method, scores, channels, group.name, ratio, SelectionRequest(target=("macs", 0.5))
            )
            for ratio in (0.9, 0.5, 0.01)
        ]
        assert set(gone[0]) <= set(gone[1]) <= set(gone[2])
        kept = [group.width - len(one) for one in gone]
        assert kept[1] <= group.width // 2
        assert kept[2] == 1
        if name != "graph":
            assert kept == [round(0.9 * group.width), group.width // 2, 1]


def test_the_suggestion_is_a_recipe_key():
    """What is suggested keeps, as select.keep_ratios, what was measured."""
    channels = tiny.bench(tiny.network()).graph
    lines = []
    for group, lost in zip(channels.free, ((0, 1, 5), (2, 0, 0), (0.5, 3, 0.2)), strict=False):
        points = [
            RatioPoint(r, round(r * group.width), 1, 90 - d, 1) for r, d in zip((0.9, 0.5, 0.3), lost, strict=True)
        ]
        lines.append(RatioCurve(group.name, group.width, tuple(points)))
    found = RatioCurves(RatioPoint(1, 0, 1, 90, 1), tuple(lines), 10, "images")
    assert [line.group for line in found.ordered] == [lines[0].group, lines[2].group, lines[1].group]
    assert found.suggestion(1.0) == {lines[0].group: 0.5, lines[2].group: 0.9}, "not behind a ratio that costs more"
    method = tiny.method("l1")
    scores = method.score(tiny.bench(tiny.network()))
    plan = method.select(scores, channels, SelectionRequest(keep_ratio=1.0, keep_ratios=found.suggestion(1.0)))
    assert plan.counts[lines[0].group] == lines[0].points[1].kept
    assert plan.counts[lines[1].group] == lines[1].width
    assert set(plan.removed) == {lines[0].group, lines[2].group}


def test_the_verb(folder, alone, capsys):
    """Files, page and JSON; options that are wrong are refused before any work."""
    place = folder / "1"
    words = ["ratio-curves", "quickstart", "--run-dir", str(place), "--ratios", "0.8,0.3", "--images", "60"]
    assert main([*words, "--json", *WORDS]) == 0
    said = capsys.readouterr()
    body = json.loads(said.out)
    assert "done before, skipped" in said.err
    assert body["dense"]["top1"] == alone.dense.figure
    rows = list(csv.DictReader((place / "ratio_curves.csv").read_text().splitlines()))
    assert [row["group"] for row in rows[1::2]] == [line.group for line in alone.ordered]
    assert [float(row["top1"]) for row in rows[1:]] == pytest.approx(
        [p.figure for line in alone.ordered for p in line.points], abs=1e-4
    )
    assert np.all(np.diff([line.drop(alone.dense) for line in alone.ordered]) <= 0)
    page = (place / "ratio_curves.html").read_text()
    assert page.count('<figure class="panel">') == 3 and "training images that train.holdout holds out" in page
    assert main([*words, "--split", "test", *WORDS]) == 0
    said = capsys.readouterr().out
    assert "are too good" in said and "are too good" in (place / "ratio_curves_test.html").read_text()
    for wrong, why in (
        (["--ratios", "0.8,1.5"], "above 0 and below 1"), (["--images", "none"], "a positive number or 'all'"),
        (["--max-drop", "-1"], "at least 0"),
    ):  # fmt: skip
        assert main([*words, *wrong, *WORDS]) == 2
        assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["select.plan=plan.json", "target.macs="], "no criterion ranks channels"),
        (["method.name=mint", "method.p=[0.5]", "target.macs="], "masks blocks of weights and ranks no channels"),
    ],
)
def test_recipes_that_rank_nothing_are_refused_before_any_work(tmp_path, capsys, words, why):
    assert main(["ratio-curves", "quickstart", "--run-dir", str(tmp_path / "run"), *WORDS, *words]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_printed_can_be_typed(folder, capsys):
    """The line of keys goes through a shell, and the groups that it does not name stay whole."""
    place = folder / "1"
    words = ["ratio-curves", "quickstart", "--run-dir", str(place), "--ratios", "0.8,0.3", "--images", "60"]
    assert main([*words, "--max-drop", "100", *WORDS]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "select.keep_ratios=" in line)
    spec = loading.load("quickstart", [*WORDS, *shlex.split(line)], methods.options_of)
    assert spec.select.keep_ratios and set(spec.select.keep_ratios.values()) <= {0.8, 0.3}


@pytest.mark.slow
def test_two_processes_of_a_launcher(folder, alone, tmp_path):
    """torchrun -m: the files of one process, and one voice."""
    import sys

    launcher = (
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dist_prune.cli",
        "ratio-curves", "quickstart", "--run-dir", str(folder / "1"), "--ratios", "0.8,0.3", "--images", "60",
    )  # fmt: skip
    (folder / "1" / ratio_curves.RECORD).unlink()
    code, output = run(launcher, None, *WORDS, PYTHONPATH=str(ROOT))
    assert code == 0, output
    assert output.count("select.keep_ratios=") + output.count("every group alone loses") == 1
    rows = list(csv.DictReader((folder / "1" / "ratio_curves.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows[1:]] == pytest.approx(
        [p.loss for line in alone.ordered for p in line.points], abs=1e-6
    )


def test_each_cut_is_also_judged_repaired(folder, tmp_path, pool):
    """The same figures beside them, apart from the images that repair; any number of ranks gives the same."""
    words = [*WORDS, "repair.method=least_squares", "repair.images=60"]
    asked = RatioRequest((0.3,), 60)
    found = curves(Communicator(), tmp_path / "one", words, asked)
    for name in (
        "dense.safetensors",
        "round_1/scores.safetensors",
        "ledger.jsonl",
        "recipe.yaml",
        "stage_started.json",
    ):
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)  # two ranks would train other weights
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    for two in pool.run(2, curves, tmp_path / "two", words, asked):
        assert two == found
    points = [point for line in found.lines for point in line.points]
    assert all(point.repaired is not None for point in points)
    repaired = sum(abs(found.dense.figure - point.best) for point in points)
    cut = sum(abs(found.dense.figure - point.figure) for point in points)
    assert repaired < cut
    rows = list(csv.DictReader(found.csv().splitlines()))
    assert float(rows[1]["repaired_top1"]) == pytest.approx(found.ordered[0].points[0].best, abs=1e-3)
