"""A search as a user runs it: for several targets, killed and resumed, refused where it makes no sense."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_prune import methods
from dist_prune.cli import check
from dist_prune.config import loading
from dist_prune.config.recipe import Recipe
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.pipeline.stage_graph import stages_of, stages_of_recipe
from dist_prune.run import run as whole_run
from dist_prune.scoring import network_times
from tests.e2e.test_targets import WORDS
from tests.support.launch import PYTHON, TORCHRUN, finish, report, start, wait_for

SEARCH = (
    *WORDS, "train.holdout=0.2", "select.search.candidates=24", "select.search.images=120",
    "select.search.repair_images=60", "select.search.micro_batch=60", "target.macs=0.5",
)  # fmt: skip


def load(*words: str) -> Recipe:
    return loading.load("quickstart", [*SEARCH, *words], methods.options_of)


def whole(folder: Path, *words: str) -> dict[str, Any]:
    assert whole_run(load(*words), folder, DistributedEnvironment.single_process()) == ""
    return report(folder)


def stages_in(folder: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A search for two targets."""
    folder = tmp_path_factory.mktemp("search") / "run"
    return folder, whole(folder, "select.search.targets=[0.7]")


def test_a_run_with_a_search(served):
    folder, body = served
    search, file = body["search"], json.loads((folder / "round_1/search.json").read_text())
    assert search["winner"]["figure"] >= search["uniform"]["figure"] and search["uniform"]["origin"] == "uniform"
    assert 0.47 < body["achieved"]["macs"] == search["winner"]["macs"] <= 0.5
    assert [line["target"] for line in search["winners"]] == [0.5, 0.7]
    assert len(file["candidates"]) == len(search["lines"]) == 24
    assert all(line["seconds"] > 0 and line["share"] <= line["target"] for line in file["candidates"])
    assert file["plans"][str(file["winner"])] == body["plan"]["fingerprint"]
    kept = {group["name"]: group["kept"] for group in body["plan"]["groups"]}
    assert {group["name"]: group["found"] for group in search["groups"]}.items() <= kept.items()
    page = (folder / "report.html").read_text()
    assert "The search for each group" in page and "every candidate" in page and page.count("<svg") >= 3
    assert not (folder / "round_1/partial_search").exists()


def test_no_image_judges_that_trains_repairs_or_tests(served):
    images = served[1]["search"]["images"]
    assert images == {"judged": 120, "repaired": 60}
    assert served[1]["search"]["judged_on"].startswith("120 training images that train.holdout holds out")


def test_check_predicts_the_forward_passes(served):
    spec = load()
    kind = methods.find("l1")
    said = check.as_text(check.preview(spec, kind(kind.Options())))
    assert "search: at most 72 forward passes of 60 images, 4,320 images in all, through 24 pruned networks" in said
    lines = json.loads((served[0] / "round_1/search.json").read_text())["candidates"]
    different = len({tuple(line["counts"]) for line in lines})
    assert served[1]["search"]["forward_passes"] == 3 * different <= 72


def test_one_search_serves_another_target(served, tmp_path):
    folder, body = served
    words = (f"select.from={folder}", "select.search=null", "target.macs=0.7", "train.epochs=0",
             f"backbone.checkpoint={folder / 'dense.safetensors'}")  # fmt: skip
    # the same network, trained once: its scores are those of the search
    other = whole(tmp_path / "other", *words)
    winner = next(line for line in body["search"]["winners"] if line["target"] == 0.7)
    assert other["achieved"]["macs"] == winner["macs"] and other["search"]["winner"]["number"] == winner["number"]
    assert "of " + str(folder) in (tmp_path / "other/report.html").read_text()
    with pytest.raises(PruneError, match=r"the front of .* has no network within target\.macs 0\.3"):
        whole(tmp_path / "none", *words, "target.macs=0.3")
    with pytest.raises(PruneError, match="cut by other scores than this run's. Set score.from="):
        whole(tmp_path / "scores", *words, "method.name=fpgm")
    with pytest.raises(PruneError, match=r"searched for target\.macs, this recipe asks for params"):
        whole(tmp_path / "cost", *words, "target.macs=", "target.params=0.7")
    with pytest.raises(PruneError, match=r"select\.from: .* has no finished search"):
        whole(tmp_path / "empty", *words, f"select.from={tmp_path}")


def test_another_search_in_the_same_run_starts_at_the_selection(served):
    folder = served[0]
    before = len(stages_in(folder))
    body = whole(folder, "select.search={solver: knapsack}")
    assert stages_in(folder)[before:][0] == "select" and body["search"]["solver"] == "knapsack"
    assert 0.49 < body["achieved"]["macs"] <= 0.5
    assert any(group["found"] != group["uniform"] for group in body["search"]["groups"])
    assert "by a knapsack" in (folder / "report.html").read_text()


def test_memory_is_a_target_that_is_counted_and_measured(tmp_path):
    body = whole(tmp_path / "run", "target.macs=", "target.memory=0.8", "select.search.candidates=6")
    assert 0.7 < body["achieved"]["memory"] <= 0.8
    for one in body["memory"].values():
        assert one["counted"] == one["measured"]
    assert body["memory"]["pruned"]["measured"] <= 0.8 * body["memory"]["dense"]["measured"]


@pytest.mark.parametrize(
    "solver",
    ["select.search={solver: knapsack}", pytest.param("select.search.candidates=10", marks=pytest.mark.slow)],
)
def test_a_latency_is_searched_and_measured(monkeypatch, tmp_path, solver):
    def latency(models, shape, batches, repeats, device, threads, timer=None, rounds=3):
        size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        return {
            name: {str(b): {"ms": 0.3 + 0.7 * size[name] / size[""], "ms_best": 1.0, "reliable": True} for b in batches}
            for name in models
        }

    monkeypatch.setattr(network_times, "measure_latency", latency)
    body = whole(tmp_path / "run", "target.macs=", "target.latency=0.6", solver)
    assert body["achieved"]["latency"] == pytest.approx(0.6, rel=0.05)


@pytest.mark.slow
def test_rounds_search_each(tmp_path):
    words = ("schedule.rounds=2", "schedule.finetune_epochs=0", "select.search.candidates=8")
    body = whole(tmp_path / "run", *words)
    assert (tmp_path / "run/round_2/search.json").is_file()
    assert 0.47 < body["achieved"]["macs"] <= 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["select.search.candidate=3"], "select.search.candidate: unknown key. Did you mean 'candidates'?"),
        (["select.search.candidates=0"], "select.search.candidates: Input should be greater than or equal to 1"),
        (["select.search.judge=test"], "select.search.judge: Input should be 'heldout'"),
        (["select.search={solver: knapsack, images: 5}"], "solver knapsack judges no candidates; leave out images"),
        (["train.images=1", "train.batch=4", "train.epochs=0"], "train.holdout=0.2 of the 1 training images is none"),
        (["method.name=graph", "select.threshold=0.5"], "select.search: graph chooses channels by a rule of its own"),
        (["method.name=sensitivity"], "select.search: sensitivity chooses channels by a rule of its own"),
        (["target.macs=", "select.keep_ratio=0.5"], "leave out select.keep_ratio"),
        (["target.macs="], "select.search: a search needs a target: set target.macs"),
        (["select.scope=global"], "select.scope=global is one of its first candidates"),
        (["target.macs=0.0001"], "target.macs: 0.0001 cannot be reached"),
        (["select.search.targets=[0.0001]"], "select.search.targets: target.macs: 0.0001 cannot be reached"),
        (["select.from=/nowhere"], "select.from: it takes the result of a search; leave it or select.search out"),
        (["target.macs=", "target.latency=0.5", "select.search.targets=[0.7]"], "one search serves one target.latency"),
    ],
)
def test_what_makes_no_sense_is_refused_before_work(words, said, tmp_path):
    with pytest.raises(PruneError) as error:
        whole_run(load(*words), tmp_path / "run", DistributedEnvironment.single_process())
    assert said in str(error.value)
    assert not (tmp_path / "run/ledger.jsonl").exists()


def test_without_a_search_stages_are_as_before():
    recipe = loading.load("quickstart", [], methods.options_of)
    assert stages_of_recipe(recipe) == stages_of(1)
    searching = {stage.label: stage for stage in stages_of_recipe(load())}
    for stage in stages_of(1):
        if stage.name != "select":
            assert searching[stage.label] == stage
    assert searching["select"].outputs[-1] == "round_1/search.json"


@pytest.mark.slow
def test_a_killed_search_finds_the_same_winner_on_other_ranks(tmp_path):
    words = (*SEARCH, "select.search.candidates=60", "select.search.images=360")
    one, _ = finish(PYTHON, tmp_path / "one", *words)
    same = (*words, "train.epochs=0", f"backbone.checkpoint={one / 'dense.safetensors'}")
    two = tmp_path / "two"
    process = start(PYTHON, two, *same)
    judged = two / "round_1/partial_search/judged.jsonl"
    wait_for(process, lambda: judged.is_file() and len(judged.read_text().splitlines()) > 5)
    process.kill()
    process.communicate()
    assert not (two / "round_1/search.json").exists(), "killed within its search"
    finish(TORCHRUN, two, *same)
    found = [report(folder)["plan"]["fingerprint"] for folder in (one, two)]
    assert found[0] == found[1]
    lines = [json.loads((folder / "round_1/search.json").read_text())["candidates"] for folder in (one, two)]
    assert [(c["counts"], c["figure"]) for c in lines[0]] == [(c["counts"], c["figure"]) for c in lines[1]]
