"""Another kind of cost is one definition: the recipe, the search, the reports and the verbs know it from there."""

import json
from pathlib import Path

import pytest

from dist_prune import methods
from dist_prune.cli import check, compare
from dist_prune.config import loading
from dist_prune.config.pruning import SETTINGS, Target
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.export.hub import model_card
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan import files
from dist_prune.pruning.selection import plan_summary
from dist_prune.pruning.selection.cost import COSTS, Cost, counted_costs, register, target_keys
from dist_prune.run import run
from tests.e2e.test_targets import WORDS
from tests.support.launch import report

ASKED = ("target.activations=0.6", "target.tolerance=0.05", "schedule.rounds=2", "schedule.finetune_epochs=0")


def elements(channels: DependencyGraph, kept) -> int:
    """Elements of the outputs of convolutions and linear layers, of one image."""
    widths = channels.widths(kept)
    return sum(
        widths[n][1] * layer.positions for n, layer in channels.layers.items() if layer.kind in ("conv", "linear")
    )


@pytest.fixture(scope="module")
def activations():
    """The whole definition, taken back at the end."""
    register(Cost("activations", elements, "activations", "activations", "k"))
    yield COSTS["activations"]
    del COSTS["activations"], Target.costs["activations"]


def load(*words: str):
    return loading.load("quickstart", [*WORDS, "target.macs=null", *words], methods.options_of)


@pytest.fixture(scope="module")
def made(activations, tmp_path_factory) -> Path:
    """A run whose target is of the new cost."""
    folder = tmp_path_factory.mktemp("new") / "run"
    assert run(load(*ASKED), folder, DistributedEnvironment.single_process()) == ""
    return folder


def test_a_run_reaches_its_target_and_reports_it(made):
    body = report(made)
    assert body["target"] == {"activations": 0.6}
    assert 0.57 < body["achieved"]["activations"] <= 0.6
    dense, tuned = (body[name]["activations"] for name in ("dense", "finetuned"))
    assert tuned / dense == body["achieved"]["activations"]
    first, last = (line["activations"] for line in body["rounds"])
    assert first > last == body["achieved"]["activations"], "rounds go down to it"
    page = (made / "report.html").read_text()
    assert "<td>activations (k)</td>" in page and "60.0% of the activations)" in page


def test_a_second_start_finds_everything_done(made):
    before = (made / "ledger.jsonl").read_text().splitlines()
    assert run(load(*ASKED), made, DistributedEnvironment.single_process()) == ""
    new = (made / "ledger.jsonl").read_text().splitlines()[len(before) :]
    assert {json.loads(line)["stage"] for line in new} <= {"report"}, "only the report tells of this start"


def test_verbs_and_pages_show_it(made):
    spec = load("target.activations=0.6")
    kind = methods.find("l1")
    channels, _, _ = check.trace_backbone(spec, kind(kind.Options()))
    looked = check.preview(spec, kind(kind.Options()))
    assert looked["dense"]["activations"] == elements(channels, {})
    assert 0 < looked["reachable"]["activations"][0] < 0.6
    assert " activations" in check.as_text(looked)
    planned = plan_summary.summarize_plan(files.read_plan(made / "round_2/plan.json", channels), channels)
    assert planned["removed"]["activations"] == pytest.approx(1 - report(made)["achieved"]["activations"])
    found = compare.collect([made])
    assert found.rows[0]["activations_share"] == report(made)["achieved"]["activations"]
    assert "activations kept" in compare.markdown(found)
    assert "| activations | " in model_card(json.loads((made / "export/bundle.json").read_text()))


def test_a_target_out_of_reach_or_missed_is_said_of_it(activations, tmp_path):
    with pytest.raises(PruneError, match=r"target\.activations: 0\.001 cannot be reached"):
        run(load("target.activations=0.001"), tmp_path / "far", DistributedEnvironment.single_process())
    words = ("target.activations=0.6", "select.round_to=32", "target.tolerance=0.001")
    assert run(load(*words), tmp_path / "coarse", DistributedEnvironment.single_process()).startswith(
        "target.activations: 0.6 was asked for"
    )


def test_a_recipe_names_it_like_any_other_key(activations):
    assert load("target.activations=0.6").target.asked() == ("activations", 0.6)
    assert "activations" not in load("target.macs=0.5", "target.activations=").resolved()["target"]
    assert "activations" not in load().resolved()["target"], "other recipes stay as they were, and their fingerprints"
    assert "`target.activations` | null" in loading.reference()
    assert "target.activations" in target_keys()
    for words, said in (
        (["target.activation=0.6"], "target.activation: unknown key. Did you mean 'activations'?"),
        (["target.activations=7"], "target.activations: Input should be less than or equal to 1"),
        (["target.activations=0.6", "target.macs=0.5"], "one target at a time, got macs and activations"),
    ):
        with pytest.raises(PruneError) as error:
            load(*words)
        assert said in str(error.value)


def test_everything_wrong_in_the_section_is_said_at_once():
    with pytest.raises(PruneError) as error:
        load("target.watts=0.6", "target.tolerance=-1")
    assert "target.watts: unknown key. Allowed here: macs, " in str(error.value)
    assert "target.tolerance: Input should be greater than 0 (got -1)" in str(error.value)


def test_the_recipe_s_own_keys_are_the_costs_of_the_package():
    built_in = [cost.name for cost in COSTS.values() if cost.target and cost.name not in Target.costs]
    assert built_in == [name for name in Target.model_fields if name not in SETTINGS]
    assert [cost.name for cost in counted_costs() if cost.name in built_in] == ["macs", "params", "channels"]
    assert target_keys().startswith("target.macs, target.params")


@pytest.mark.parametrize("name", ["macs", "latency_batch"])
def test_a_taken_name_is_refused(name):
    with pytest.raises(PruneError, match=f"'{name}' is no name for another cost"):
        register(Cost(name, elements, "elements"))
