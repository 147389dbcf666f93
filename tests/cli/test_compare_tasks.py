"""dist-prune compare of runs of several tasks: each by its own figure, in its own unit and direction."""

import csv
import json
import shutil

import pytest

from dist_prune.cli.compare import page_rows
from dist_prune.cli.comparison import TOP1, collect
from dist_prune.cli.main import main
from dist_prune.report.compare_html import panels
from dist_prune.report.plots import pareto
from tests.support import ink
from tests.support.launch import SMALL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Real runs: a classification, and a regression at two targets."""
    folder = tmp_path_factory.mktemp("tasks")
    recipe = ink.write(folder / "data")
    ink.prune("quickstart", folder / "runs/classes", *SMALL, *ink.WORDS)
    for target in (0.8, 0.4):
        ink.prune(recipe, folder / f"runs/ink_{target}", *ink.WORDS, f"target.macs={target}")
    return folder / "runs"


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_each_task_has_its_own_figure(runs):
    found = collect([runs])
    assert not found.unfinished
    assert found.figures["classification"] == TOP1
    figure = found.figures["regression"]
    assert (figure.key, figure.title, figure.higher_is_better) == ("rmse", "RMSE", False)
    assert [row["task"] for row in found.rows] == ["regression", "regression", "classification"]
    for row, name in zip(found.of("regression").rows, ("ink_0.4", "ink_0.8"), strict=True):
        body = report(runs / name)
        assert row["rmse"] == body["finetuned"]["rmse"] and row["dense_rmse"] == body["dense"]["rmse"]
        assert row["change"] == pytest.approx(body["finetuned"]["rmse"] - body["dense"]["rmse"])
        assert row["rmse_error"] is None, "an error of a share of images is none of an RMSE"
        assert "top1" not in row


def test_tables_and_csv(runs, tmp_path, capsys):
    assert main(["compare", str(runs), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "**Runs, regression: RMSE (lower is better)**" in text and "**Runs, classification: top-1 %**" in text
    _, ink_part = text.split("**Runs, regression")
    assert "top-1" not in ink_part.partition("**Runs")[0] and "points" not in ink_part.partition("**Runs")[0]
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "compare.csv").read_text().splitlines())}
    (classes,) = (row for row in rows.values() if row["task"] == "classification")
    assert classes["rmse"] == "" and float(classes["top1"]) == report(runs / "classes")["finetuned"]["top1"]
    others = [row for row in rows.values() if row["task"] == "regression"]
    assert [row["top1"] for row in others] == ["", ""]
    assert {float(row["rmse"]) for row in others} == {
        report(runs / f"ink_{target}")["finetuned"]["rmse"] for target in (0.4, 0.8)
    }
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<section data-facet") == 2 and page.count('<figure class="panel">') == 12
    assert page.count(" data-lower>") == 6, "the plots of the regression"
    assert '<option value="regression">regression</option>' in page


def test_classification_alone_keeps_its_columns(runs, tmp_path):
    assert main(["compare", str(runs / "classes"), "--out", str(tmp_path)]) == 0
    head = (tmp_path / "compare.csv").read_text().partition("\n")[0].split(",")
    assert head[:11] == ["run", "seeds", "backbone", "method", "dense_top1", "pruned_top1", "top1", "top1_std",
                         "images", "top1_error", "change"]  # fmt: skip
    assert "task" not in head
    assert "**Runs**" in (tmp_path / "compare.md").read_text()


def test_an_error_s_front_is_its_lower_edge(runs, tmp_path):
    """The network of fewest MACs, and what has a smaller error: by its reports, not as it happens to be trained."""
    for number, (cost, rmse) in enumerate([(0.2, 0.4), (0.3, 0.5), (0.4, 0.2), (0.5, 0.3), (0.6, 0.1)]):
        place = tmp_path / f"runs/{number}"
        shutil.copytree(runs / "ink_0.4", place)
        body = report(place)
        body["finetuned"] |= {"rmse": rmse, "macs": cost * body["dense"]["macs"]}
        body["dense"]["rmse"], body["recipe"]["select"]["min_channels"] = 0.199, number + 1
        body["name"] = f"ink{number}"
        (place / "report.json").write_text(json.dumps(body))
    found = collect([tmp_path / "runs"])
    own = found.of("regression")
    plots = panels(page_rows(own), [], found.batches, ["l1"], found.figures["regression"])
    assert [y for _, y in plots[0].lines[0].points] == [0.4, 0.2, 0.1]
    assert plots[0].lower and plots[0].y_title == "RMSE (lower is better)"
    assert [round(y, 3) for _, y in plots[-3].lines[0].points] == [0.201, 0.001, -0.099]
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/compare.html").read_text()
    assert "within 1 % of the RMSE of its dense network" in page
    assert "(40.0%" in page and "RMSE +0.001)" in page, "0.2 is 0.5 % above 0.199; 0.3 is not close"


def test_the_front_of_an_error():
    points = [(1.0, 0.5), (2.0, 0.6), (3.0, 0.2), (3.0, 0.4)]
    assert pareto(points, "left", higher_is_better=False) == [(1.0, 0.5), (3.0, 0.2)]
    assert pareto(points, "right", higher_is_better=False) == [(3.0, 0.2)]
    assert pareto(points) == [(1.0, 0.5), (2.0, 0.6)]


def test_a_figure_that_is_no_number_is_said(runs, tmp_path):
    shutil.copytree(runs / "ink_0.4", tmp_path / "runs/nan")
    shutil.copytree(runs / "ink_0.8", tmp_path / "runs/whole")
    body = report(tmp_path / "runs/nan")
    body["finetuned"]["rmse"] = None
    (tmp_path / "runs/nan/report.json").write_text(json.dumps(body))
    found = collect([tmp_path / "runs"])
    assert [row["run"] for row in found.rows] == ["digits_ink"]
    assert "RMSE of the finetuned network is not a number" in found.unfinished[0]["why"]
