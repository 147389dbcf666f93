"""Shapley values and switches through whole runs: held-out images, more samples in a run directory, the report."""

import json

import numpy as np
import pytest

from dist_prune import methods
from dist_prune.cli.check import as_text, preview
from dist_prune.config import loading
from dist_prune.data.datasets import open_source
from dist_prune.data.sampling import holdout_split
from dist_prune.distributed import tensor_files
from dist_prune.methods.shapley import Shapley
from dist_prune.methods.shapley.options import Options
from tests.support.launch import ACCELERATE, PYTHON, SMALL, report, run

COUNTS = "select.counts={conv1: 12, layer1.0.conv1: 5}"
PLAIN = (
    "backbone.kwargs={img_size: 8}",
    "select.exclude=['layer[23]*', linear]",
    "target.macs=null",
    COUNTS,
    "finetune.epochs=0",
)
SHAPLEY = (*SMALL, *PLAIN, "method.name=shapley", "train.epochs=1")

pytestmark = pytest.mark.slow  # all of them look at one run, which takes half a minute


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run with 2 samples, then with 14 in the same directory: what each printed."""
    folder, said = tmp_path_factory.mktemp("shapley") / "run", []
    for samples in (2, 14):
        code, output = run(PYTHON, folder, *SHAPLEY, f"method.samples={samples}")
        assert code == 0, output
        said.append(output)
    return folder, said


def test_more_samples_in_the_same_run_directory(grown):
    folder, said = grown
    scores, _ = tensor_files.read_tensors(folder / "round_1/scores.safetensors")
    assert len(scores["conv1:correct"]) == 14
    lines = [json.loads(line) for line in (folder / "round_1/measured.jsonl").read_text().splitlines()]
    assert len({json.dumps(line["job"]) for line in lines}) == len(lines), "nothing was measured twice"
    assert "changed since: method.samples: 2 there, 14 here" in said[1]
    assert "train: done before, skipped" in said[1]
    code, output = run(PYTHON, folder, *SHAPLEY, "method.samples=14", "method.stack=2")
    assert code == 2
    assert "method.stack: 4 there, 2 here" in output


def test_a_number_of_sets_at_the_threshold_is_said_by_check_run_and_report(grown):
    """Two groups of 16 channels: 17 unknowns each."""
    folder, said = grown
    assert "warning: method.samples: 14 random sets" in said[1]
    assert "warning: method.samples" not in said[0]
    spec = loading.load("quickstart", [*SHAPLEY, "method.samples=14"], methods.options_of)
    body = preview(spec, Shapley(Options(samples=14)))
    assert "warning: method.samples: 14 random sets" in as_text(body)
    assert any("method.samples: 14 random sets" in event["event"] for event in report(folder)["events"])


def test_accuracy_is_measured_on_held_out_images(grown):
    folder, _ = grown
    scores, _ = tensor_files.read_tensors(folder / "round_1/scores.safetensors")
    source = open_source("digits", None, "", True)
    held = holdout_split(np.arange(len(source.labels)), 0.1, 0)[1]
    assert set(scores["calibration_ids"].tolist()) <= set(held.tolist())
    assert len(scores["calibration_ids"]) == 100


def test_the_report_has_counts_rows_and_a_convergence_plot(grown):
    folder, _ = grown
    body = report(folder)
    kept = {group["name"]: group["kept"] for group in body["plan"]["groups"]}
    assert (kept["conv1"], kept["layer1.0.conv1"]) == (12, 5)
    assert [row["group"] for row in body["table"]] == ["conv1", "layer1.0.conv1"]
    assert all(row["samples"] == 14 and 0 <= row["reliability"] <= 1 for row in body["table"])
    assert "rank correlation with the final ranking" in (folder / "report.html").read_text()


def test_two_processes_make_the_same_plans(tmp_path, grown):
    """The second of them takes the first one's dense weights: training adds gradients in another order."""
    dense = f"backbone.checkpoint={grown[0] / 'dense.safetensors'}"
    for method in ("shapley", "dirichlet"):
        plans = []
        for launcher, name in ((PYTHON, "one"), (ACCELERATE, "two")):
            folder = tmp_path / f"{method}_{name}"
            code, output = run(launcher, folder, *SMALL, *PLAIN, f"method.name={method}", "train.epochs=0", dense)
            assert code == 0, output
            plans.append(report(folder)["plan"]["fingerprint"])
        assert plans[0] == plans[1]


def test_the_released_leak_reads_the_test_images(tmp_path, grown):
    dense = f"backbone.checkpoint={grown[0] / 'dense.safetensors'}"
    code, output = run(PYTHON, tmp_path / "run", *SHAPLEY, "method.quirks=[test_images]", "train.epochs=0", dense)
    assert code == 0, output
    scores, _ = tensor_files.read_tensors(tmp_path / "run/round_1/scores.safetensors")
    assert int(scores["calibration_ids"].max()) < len(open_source("digits", None, "", False).labels)
    code, output = run(PYTHON, tmp_path / "seen", *SHAPLEY, "train.selection=last", "method.samples=2")
    assert code == 0, output
    assert any("held-out images of scoring are trained on" in e["event"] for e in report(tmp_path / "seen")["events"])
