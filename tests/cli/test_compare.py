"""dist-prune compare: reports of a real run, seeds together, papers beside, failures with their reason."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from dist_prune.cli.comparison import TOP1, collect, paper_points
from dist_prune.cli.main import main
from dist_prune.errors import PruneError
from dist_prune.report.tables import target_text
from tests.support.launch import PYTHON, ROOT, SMALL, run


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
    assert not (folder / "failed/tensorboard").exists(), "a run without a value is no empty run of TensorBoard"
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
    ms = {kind: report[kind]["latency"]["8"]["ms"] for kind in ("dense", "finetuned")}
    assert (row["dense_ms"], row["ms"]) == pytest.approx((ms["dense"], ms["finetuned"]))
    assert row["speedup"] == (None if not row["reliable"] else pytest.approx(ms["dense"] / ms["finetuned"]))


def timed(folder, name: str, ms: float, dense_ms: float, best: float | None = None) -> None:
    """A run's report with written times, of which the pruned network's is not reliable where ``best`` says so."""
    body = json.loads((folder / "report.json").read_text())
    for kind, median in (("dense", dense_ms), ("pruned", ms), ("finetuned", ms)):
        for figures in body[kind]["latency"].values():
            figures |= {"ms": median, "ms_best": best or median, "reliable": best is None or kind == "dense"}
    body["name"], body["recipe"]["select"]["min_channels"] = name, int(ms)
    (folder / "report.json").write_text(json.dumps(body))


def test_a_time_that_is_not_reliable_is_no_point_among_others(runs, tmp_path, capsys):
    """The fastest network of all, if one believed it: it gets no speed-up, and is drawn hollow outside of the front."""
    from dist_prune.report.compare_html import panels

    for name, ms, best in (("steady", 5.0, None), ("moody", 2.0, 1.0)):
        shutil.copytree(runs / "first", tmp_path / "runs" / name)
        timed(tmp_path / "runs" / name, name, ms, 10.0, best)
    found = collect([tmp_path / "runs"])
    moody, steady = found.rows
    assert (steady["speedup"], steady["timed"]) == (2.0, "")
    assert (moody["speedup"], moody["timed"]) == (None, "not reliable")
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert next(line for line in table.splitlines() if "steady" in line).endswith("| 5.000 | 2.00x |  |")
    assert next(line for line in table.splitlines() if "moody" in line).endswith("| 2.000 |  | not reliable |")
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "out/compare.csv").read_text().splitlines())}
    assert (rows["moody"]["speedup"], rows["moody"]["timed"]) == ("", "not reliable")
    shown = [{**row, "seed": "mean|0"} for row in found.rows]
    methods = [shown[0]["method"]]
    for plot, key in zip(
        panels(shown, [], ["8"], methods, TOP1), ("MACs", "params", "ms", "MACs", "param", "speed"), strict=True
    ):
        assert key in plot.x_title
        doubtful, sure = (next(m for m in plot.marks if m.title.startswith(name)) for name in ("moody", "steady"))
        timed_axis = key in ("ms", "speed")
        assert doubtful.hollow == timed_axis and not sure.hollow
        assert ("front" in doubtful.data) != timed_axis and "front" in sure.data
        assert ("not reliable" in doubtful.title) == timed_axis
        if key == "ms":
            assert sure.x == 5.0 and doubtful.x == pytest.approx(5.0 * 0.7), "at the end of the axis, not at 2"
            assert [m.x for m in plot.marks if m.title.startswith("dense")] == [10.0]
        if key == "speed":
            assert sure.x == 2.0 and plot.better == "right"


def test_times_of_several_machines_say_which(runs, tmp_path, capsys):
    for name, ms, threads in (("one", 5.0, 1), ("other", 6.0, 2)):
        shutil.copytree(runs / "first", tmp_path / name)
        timed(tmp_path / name, name, ms, 10.0)
        body = json.loads((tmp_path / name / "report.json").read_text())
        body["environment"]["processor"] = "a processor"
        for kind in ("dense", "pruned", "finetuned"):
            for figures in body[kind]["latency"].values():
                figures |= {"device": "cpu", "threads": threads}
        (tmp_path / name / "report.json").write_text(json.dumps(body))
    assert main(["compare", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "x | a processor" in line]
    assert [line.endswith(f"a processor, {count} thread(s) |") for line, count in zip(lines, (1, 2), strict=True)] == [
        True,
        True,
    ]
    assert main(["compare", str(tmp_path / "one")]) == 0
    assert "a processor" not in capsys.readouterr().out, "one machine is no news"


def test_what_the_test_images_decided_is_marked(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "first")
    body = json.loads((runs / "first/report.json").read_text())
    assert collect([tmp_path]).rows[0]["marked"] == ""
    body["recipe"]["train"]["selection"] = "test"
    (tmp_path / "first/report.json").write_text(json.dumps(body))
    assert collect([tmp_path]).rows[0]["marked"] == "train: the kept epoch was selected on the test images"
    assert "TRAIN: THE KEPT EPOCH WAS SELECTED ON THE TEST IMAGES" in target_text(body)


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
    assert page.count('<figure class="panel">') == 6
    assert (rows[0]["name"], rows[0]["target"], rows[0]["seed_list"]) == ("graph", "macs 0.55", "0 1")
    assert int(rows[0]["images"]) == 450 and 0 < float(rows[0]["top1_error"]) < 3
    assert "reachable range" in page
    for line in (tmp_path / "out/compare.md").read_text().splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_papers_points_stand_in_the_recipes():
    """The table of a recipe's header, with rows that carry a second drop or a remark."""
    points = paper_points((ROOT / "recipes/graph/resnet50_graph.yaml").read_text())
    assert [point["point"] for point in points] == ["threshold 0.7", "threshold 0.65"]
    assert [points[0][key] for key in ("change", "macs_share", "params_share")] == pytest.approx(
        [-1.47, 0.5119, 0.7629]
    )
    assert len(paper_points((ROOT / "recipes/graph/densenet40_cifar100_graph.yaml").read_text())) == 3
    assert paper_points((ROOT / "recipes/quickstart.yaml").read_text()) == []
    chip, *_ = paper_points((ROOT / "recipes/baselines/resnet56_cifar10_chip.yaml").read_text())
    assert chip["point"] == "method chip"
    assert [chip[key] for key in ("change", "macs_share", "params_share")] == pytest.approx([0.9, 0.526, 0.572])
    fpgm, *_ = paper_points((ROOT / "recipes/baselines/resnet56_cifar10_fpgm.yaml").read_text())
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
        (None, "77", "no run was timed at batch .77.; there are times at 1, 8"),
    ],
)
def test_wrong_places_and_batches_are_refused(runs, places, batch, said):
    with pytest.raises(PruneError, match=said):
        collect(places or [runs], batch)


def timed_at(folder, name: str, batches: tuple[str, ...]) -> None:
    """A run's report whose networks were timed at these batch sizes, the pruned one twice as fast as the dense one."""
    body = json.loads((folder / "report.json").read_text())
    body["name"], body["recipe"]["select"]["min_channels"] = name, len(name)
    for kind, ms in (("dense", 10.0), ("pruned", 5.0), ("finetuned", 5.0)):
        figures = {"ms": ms, "ms_best": ms, "reliable": True, "device": "cpu", "threads": 1}
        body[kind]["latency"] = {batch: {**figures, "ms": ms * int(batch)} for batch in batches}
    (folder / "report.json").write_text(json.dumps(body))


def test_runs_without_a_common_batch_size_are_compared_as_well(runs, tmp_path, capsys):
    """Times at each batch size in columns and plots of their own, and a sentence that says so."""
    for name, batches in (("small", ("1", "8")), ("large_one", ("32",)), ("largest", ("32", "64"))):
        shutil.copytree(runs / "first", tmp_path / "runs" / name)
        timed_at(tmp_path / "runs" / name, name, batches)
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    head = next(line for line in said.splitlines() if line.startswith("| run"))
    assert "ms, batch 8 | speed-up, batch 8 | ms, batch 32 | speed-up, batch 32 |" in head
    small = next(line for line in said.splitlines() if line.startswith("| small"))
    assert small.endswith("| 5.000 | 2.00x | 40.000 | 2.00x |  |  |  |  |")
    note = "No batch size is common to the times of all 3 recipes (report.latency_batches): 1 in 1, 8 in 1, 32 in 2"
    assert note in said
    page = (tmp_path / "out/compare.html").read_text()
    assert note in page and "speed-up, batch 64" in page
    assert page.count('<figure class="panel">') == 2 * (2 + 4), "each of two costs and four batch sizes, twice"
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "out/compare.csv").read_text().splitlines())}
    assert (rows["small"]["speedup_8"], rows["small"]["ms_32"], rows["largest"]["ms_64"]) == ("2.0", "", "320.0")
    assert main(["compare", str(tmp_path / "runs"), "--batch", "32"]) == 0
    said = capsys.readouterr().out
    assert next(line for line in said.splitlines() if line.startswith("| small")).endswith("|  |  |")
    assert "Not timed at batch 32: small." in said


def test_quotes_in_a_terminal_s_table_are_quotes(runs, tmp_path, capsys):
    """What could break a table or bring an element into a page does not."""
    shutil.copytree(runs / "failed", tmp_path / "failed")
    (tmp_path / "failed/errors/rank_0.json").write_text(json.dumps({"rank": 0, "error": "no 'x' in \"y\" | <b>"}))
    assert main(["compare", str(tmp_path)]) == 0
    assert "no 'x' in \"y\" / &lt;b&gt;" in capsys.readouterr().out
