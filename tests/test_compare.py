"""dist-prune compare: reports of a real run, seeds together, papers beside, failures with their reason."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from dist_prune.cli import main
from dist_prune.comparing import collect, paper_points
from dist_prune.errors import PruneError
from dist_prune.stages.page import aim
from tests.launch import PYTHON, ROOT, SMALL, run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs: a real one, the same with another seed and accuracy, one that failed, one that goes on."""
    folder = tmp_path_factory.mktemp("runs")
    code, output = run(PYTHON, folder / "first", *SMALL, "train.epochs=1", "finetune.epochs=0")
    assert code == 0, output
    shutil.copytree(folder / "first", folder / "second")
    body = json.loads((folder / "first/report.json").read_text())
    body["recipe"]["seed"] = 1
    body["finetuned"]["top1"] += 3
    (folder / "second/report.json").write_text(json.dumps(body))
    code, output = run(PYTHON, folder / "failed", *SMALL, "target.macs=0.00001")
    assert code == 2, output
    shutil.copytree(folder / "first", folder / "going")
    (folder / "going/report.json").unlink()
    return folder


def test_seeds_become_mean_and_deviation(runs):
    found = collect([runs])
    assert len(found.rows) == 1
    row, report = found.rows[0], json.loads((runs / "first/report.json").read_text())
    assert row["seeds"] == 2
    assert row["top1"] == pytest.approx(report["finetuned"]["top1"] + 1.5)
    assert row["top1_std"] == pytest.approx(3 / 2**0.5)
    assert row["macs"] == report["finetuned"]["macs"] / 1e6
    assert row["macs_share"] == pytest.approx(report["achieved"]["macs"])
    assert row["speedup"] == pytest.approx(
        report["dense"]["latency"]["8"]["ms"] / report["finetuned"]["latency"]["8"]["ms"]
    )


def test_what_the_test_images_decided_is_marked(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "first")
    body = json.loads((runs / "first/report.json").read_text())
    assert collect([tmp_path]).rows[0]["marked"] == ""
    body["recipe"]["train"]["selection"] = "test"
    (tmp_path / "first/report.json").write_text(json.dumps(body))
    assert collect([tmp_path]).rows[0]["marked"] == "train: the kept epoch was selected on the test images"
    assert "TRAIN: THE KEPT EPOCH WAS SELECTED ON THE TEST IMAGES" in aim(body)


def test_what_did_not_finish_says_why(runs):
    why = {item["run"]: item["why"] for item in collect([runs]).unfinished}
    assert set(why) == {"failed", "going"}
    assert "reachable range" in why["failed"]
    assert why["going"] == "not finished; the last finished stage is report"


def test_a_report_of_an_earlier_start_is_not_the_run_s(runs, tmp_path):
    """The same folder, started again with other keys: it failed, or is still under way."""
    for name in ("failed", "going"):
        shutil.copytree(runs / "first", tmp_path / name)
    code, output = run(
        PYTHON, tmp_path / "failed", *SMALL, "train.epochs=1", "finetune.epochs=0", "target.macs=0.00001"
    )
    assert code == 2, output
    assert (tmp_path / "failed/report.json").is_file()
    lines = (tmp_path / "going/ledger.jsonl").read_text().splitlines()
    select = next(line for line in lines if json.loads(line)["stage"] == "select")
    (tmp_path / "going/ledger.jsonl").write_text("\n".join([*lines, select]) + "\n")
    found = collect([tmp_path])
    assert found.rows == []
    why = {item["run"]: item["why"] for item in found.unfinished}
    assert "reachable range" in why["failed"] and why["failed"].endswith("(its report is of an earlier start)")
    assert why["going"] == "not finished; the last finished stage is select (its report is of an earlier start)"


def test_table_csv_and_page(runs, tmp_path, capsys):
    assert main(["compare", str(runs), "--out", str(tmp_path / "out"), "--batch", "1"]) == 0
    assert "ms, batch 1" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out/compare.csv").read_text().splitlines()))
    assert [(row["seeds"], row["source"]) for row in rows] == [("2", "measured")]
    page = (tmp_path / "out/compare.html").read_text()
    assert page.count("<svg") == 1
    assert "reachable range" in page
    for line in (tmp_path / "out/compare.md").read_text().splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_papers_points_stand_in_the_recipes():
    """The table of a recipe's header, with rows that carry a second drop or a remark."""
    points = paper_points((ROOT / "recipes/resnet50_graph.yaml").read_text())
    assert [point["point"] for point in points] == ["threshold 0.7", "threshold 0.65"]
    assert [points[0][key] for key in ("change", "macs_share", "params_share")] == pytest.approx(
        [-1.47, 0.5119, 0.7629]
    )
    assert len(paper_points((ROOT / "recipes/densenet40_cifar100_graph.yaml").read_text())) == 3
    assert paper_points((ROOT / "recipes/quickstart.yaml").read_text()) == []
    chip, *_ = paper_points((ROOT / "recipes/resnet56_cifar10_chip.yaml").read_text())
    assert chip["point"] == "method chip"
    assert [chip[key] for key in ("change", "macs_share", "params_share")] == pytest.approx([0.9, 0.526, 0.572])
    fpgm, *_ = paper_points((ROOT / "recipes/resnet56_cifar10_fpgm.yaml").read_text())
    assert fpgm["params_share"] is None


def test_papers_points_stand_beside_runs(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "run")
    body = json.loads((tmp_path / "run/report.json").read_text())
    body["name"] = "vgg16_cifar10_graph-threshold_0.7"
    (tmp_path / "run/report.json").write_text(json.dumps(body))
    found = collect([tmp_path / "run"])
    assert {point["recipe"] for point in found.papers} == {"vgg16_cifar10_graph"}
    assert len(found.papers) == 3
    body["name"] = "resnet56_cifar10_fpgm"  # a paper that does not say how many parameters it keeps
    (tmp_path / "run/report.json").write_text(json.dumps(body))
    assert main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "resnet56_cifar10_fpgm | method whc | -0.12 | 47.4% |  |" in (tmp_path / "out/compare.md").read_text()
    assert "resnet56_cifar10_fpgm, method whc" in (tmp_path / "out/compare.csv").read_text()


@pytest.mark.parametrize(
    ("places", "batch", "said"),
    [
        ([Path("/nowhere")], None, "there is no folder /nowhere"),
        ([ROOT / "launch"], None, "no run directory"),
        (None, "77", "no latency at batch 77 in all runs; all have 1, 8"),
    ],
)
def test_wrong_places_and_batches_are_refused(runs, places, batch, said):
    with pytest.raises(PruneError, match=said):
        collect(places or [runs], batch)
