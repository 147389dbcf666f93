"""Ratio curves of tasks that do not classify: by their own figure and direction, equal for any number of ranks."""

import csv
import json
import shutil

import pytest
import torch

from dist_prune import methods
from dist_prune.analysis import ratio_curves
from dist_prune.analysis.ratio_curves import RatioCurve, RatioCurves, RatioPoint, RatioRequest, measure
from dist_prune.cli.main import main
from dist_prune.cli.ratio_curves import largest_drop, suggestion_text
from dist_prune.config import loading
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.surgery import surgeon
from dist_prune.run import run as run_stages
from dist_prune.tasks.primary import PrimaryFigure
from dist_prune.tasks.regression import Regression
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import ink

RMSE = PrimaryFigure.of(Regression().description())
ASKED = RatioRequest((0.8, 0.3), 20)
SCORED = ("dense.safetensors", "round_1/scores.safetensors", "ledger.jsonl", "recipe.yaml", "stage_started.json")


def curves(ranks, folder, recipe, asked=ASKED, words=()):
    """The verb's work on the ranks of a pool."""
    found = []
    spec = loading.load(str(recipe), [*ink.WORDS, *words], methods.options_of)

    def then(context) -> None:
        found.append(measure(context, asked))

    run_stages(spec, folder, DistributedEnvironment(torch.device("cpu"), ranks), until="score", then=then)
    return found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ink")
    return folder, ink.write(folder)


@pytest.fixture(scope="module")
def alone(place):
    folder, recipe = place
    return curves(Communicator(), folder / "1", recipe)


def test_each_point_is_the_cut_network_s_own_figure(alone, place):
    folder, recipe = place
    assert alone.primary == RMSE
    assert alone.images == 20
    first = alone.lines[0]

    def then(context) -> None:
        graph, scores = context.networks.graph, context.read_tensors("round_1/scores.safetensors")
        loader, ids, _ = ratio_curves.evaluation_images(context, ASKED)
        for point in first.points:
            gone = ratio_curves.removed_channels(
                context.method, scores, graph, first.group, point.ratio, context.selection
            )
            model = context.networks.load_dense().eval()
            surgeon.apply_plan(model, graph, ratio_curves_plan(graph, first.group, gone))
            figures = evaluate(model, loader, 17, Communicator(), Tracker(False), ids=ids, task=context.task)
            assert point.figure == pytest.approx(figures["rmse"], rel=1e-6)
            assert point.loss == pytest.approx(figures["loss"], rel=1e-6)

    spec = loading.load(str(recipe), ink.WORDS, methods.options_of)
    run_stages(
        spec, folder / "1", DistributedEnvironment(torch.device("cpu"), Communicator()), until="score", then=then
    )
    assert len({point.figure for line in alone.lines for point in line.points}) > len(alone.lines)


def ratio_curves_plan(graph, name, gone):
    from dist_prune.analysis.cut_judges import plan_of_cut

    plan = plan_of_cut(graph, name, gone)
    assert plan.removed == {name: tuple(gone)}
    return plan


def test_two_ranks_give_the_same(alone, place, pool):
    folder, recipe = place
    for name in SCORED:
        (folder / "2" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "1" / name, folder / "2" / name)
    assert pool.run(2, curves, folder / "2", recipe) == [alone] * 2


def test_a_repaired_cut_is_judged_too(alone, place):
    folder, recipe = place
    found = curves(
        Communicator(),
        folder / "1",
        recipe,
        RatioRequest((0.3,), 20),
        ["repair.method=least_squares", "repair.images=40"],
    )
    points = [point for line in found.lines for point in line.points]
    assert all(point.repaired is not None for point in points)
    worse = [RMSE.lost(found.dense.figure, point.figure) for point in points]
    left = [RMSE.lost(found.dense.figure, point.best) for point in points]
    assert sum(map(abs, left)) < sum(map(abs, worse))


def made(*figures: tuple[float, float], dense: float = 0.2) -> RatioCurves:
    """Curves of written RMSE at the ratios 0.8 and 0.3, a group each."""
    lines = tuple(
        RatioCurve(f"g{n}", 10, tuple(RatioPoint(r, 1, 1, f, 1) for r, f in zip((0.8, 0.3), own, strict=True)))
        for n, own in enumerate(figures)
    )
    return RatioCurves(RatioPoint(1, 0, 1, dense, 1), lines, 10, "images", primary=RMSE)


def test_an_error_that_rises_is_what_is_lost():
    found = made((0.201, 0.5), (0.1, 0.15), (0.2, 0.21), (0.2, float("nan")))
    assert [line.group for line in found.ordered] == ["g3", "g0", "g2", "g1"], "what has no value is the worst"
    assert found.suggestion(0.005) == {"g0": 0.8, "g1": 0.3, "g2": 0.8, "g3": 0.8}
    assert largest_drop(found, None) == pytest.approx(0.002), "1 % of the dense network's"
    assert largest_drop(found, 0.5) == 0.5
    assert "loses at most 0.005 of RMSE" in suggestion_text(found.suggestion(0.005), 0.005, None, RMSE)
    assert "more than 0.001 of RMSE" in suggestion_text({}, 0.001, None, RMSE)


def test_the_verb(place, alone, capsys):
    folder, recipe = place
    words = ["ratio-curves", str(recipe), "--run-dir", str(folder / "1"), "--ratios", "0.8,0.3", "--images", "20"]
    assert main([*words, "--json", *ink.WORDS]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["dense"]["rmse"] == alone.dense.figure and "top1" not in body["dense"]
    assert body["task"]["primary"] == "rmse"
    rows = list(csv.DictReader((folder / "1/ratio_curves.csv").read_text().splitlines()))
    assert [row["group"] for row in rows[1::2]] == [line.group for line in alone.ordered]
    assert float(rows[1]["rmse"]) == pytest.approx(alone.ordered[0].points[0].figure, rel=1e-5)
    page = (folder / "1/ratio_curves.html").read_text()
    assert "RMSE (lower is better)" in page and "RMSE by keep ratio" in page and "Speed-up by keep ratio" in page
    assert "top-1" not in page.lower() and "point(s)" not in page and "cross-entropy" not in page
    assert main([*words, *ink.WORDS]) == 0
    text = capsys.readouterr().out
    assert f"dense: RMSE {alone.dense.figure:.4g}, loss" in text and "top-1" not in text
