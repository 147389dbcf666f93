"""Curves over the number of kept filters and skipped finetuning of a task that does not classify, on a real run."""

import csv
import json

import numpy as np
import pytest
import torch

from dist_prune import methods
from dist_prune.analysis.cut_judges import plan_of_cut
from dist_prune.config import loading
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.surgery import surgeon
from dist_prune.run import run as run_stages
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import ink

GROUP = "layer1.0.conv1"
WORDS = (
    *ink.WORDS, "information.curves=accuracy", f"information.layers=[{GROUP}]", "information.images=20",
    "finetune.epochs=1", "finetune.only_if_drop=50",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ink")
    recipe = ink.write(folder / "data")
    return recipe, ink.prune(recipe, folder / "run", *WORDS)


def test_the_curve_is_of_the_task_s_figure(finished):
    recipe, folder = finished
    rows = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    assert "top1" not in rows[0]
    assert [int(row["kept"]) for row in rows] == list(range(len(rows), 0, -1))
    gone: list[int] = [int(row["deleted"]) for row in rows[1:]]
    checked = []

    def then(context) -> None:
        graph, loader = context.networks.graph, context.images.loader(False)
        for row in (rows[0], rows[5]):
            model = context.networks.load_dense().eval()
            removed = gone[: len(rows) - int(row["kept"])]
            if removed:
                surgeon.apply_plan(model, graph, plan_of_cut(graph, GROUP, removed))
            ids = np.arange(20)
            figures = evaluate(model, loader, 17, Communicator(), Tracker(False), ids=ids, task=context.task)
            assert float(row["rmse"]) == pytest.approx(figures["rmse"], rel=1e-4)
            checked.append(figures["rmse"])

    spec = loading.load(str(recipe), WORDS, methods.options_of)
    run_stages(spec, folder, DistributedEnvironment(torch.device("cpu"), Communicator()), until="score", then=then)
    assert len(set(checked)) == 2


def test_pages_and_events_say_its_name_and_unit(finished):
    _, folder = finished
    body = json.loads((folder / "report.json").read_text())
    (event,) = (one["event"] for one in body["events"] if one["stage"] == "finetune")
    assert event.startswith("not finetuned, pruning cost only ") and event.endswith(" of RMSE")
    page = (folder / "report.html").read_text()
    assert "RMSE (lower is better)" in page and event in page
    assert "top-1" not in page.lower() and "points of" not in page
