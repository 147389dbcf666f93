"""Keys and files of older versions: recipes are read, run directories are resumed with the fingerprints they have."""

import json

import pytest
import yaml

from dist_prune import methods
from dist_prune.config import loading, overrides
from dist_prune.config.earlier_versions import OLD_NAMES, RENAMED
from dist_prune.config.recipe import Recipe
from dist_prune.config.training import Training
from dist_prune.errors import PruneError
from dist_prune.pipeline import ledger, runner
from dist_prune.pipeline.earlier_artifact_names import artifact
from dist_prune.pipeline.ledger import Ledger, bind_recipe
from tests.stages.test_trainings import work_of

OLD = ("score.many=[l1, taylor]", "train.save_every_minutes=3", "finetune.save_every_minutes=4")
NEW = tuple(f"{RENAMED[key]}={value}" for key, value in (word.split("=") for word in OLD))


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(overrides, "_printed", set())


def load(*words: str, recipe: str = "quickstart") -> Recipe:
    return loading.load(recipe, list(words), methods.options_of)


def test_each_renamed_key_has_one_present_name():
    assert {key for key, _ in loading._keys(Recipe, "")} >= {new for new in RENAMED.values() if "finetune" not in new}
    assert len(OLD_NAMES) == len(RENAMED)
    assert not OLD_NAMES.keys() & RENAMED.keys()


def test_old_keys_are_read_and_one_line_says_the_new_name(tmp_path, capsys):
    new = load(*NEW)
    assert (new.score.compare, new.train.checkpoint_every_minutes) == (("l1", "taylor"), 3)
    assert capsys.readouterr().err == ""
    assert load(*OLD) == new
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{old} is called {now} now; the old name is still read" for old, now in RENAMED.items()]
    tree = yaml.safe_load(loading.find("quickstart").read_text())
    tree["score"]["many"] = ["l1", "taylor"]
    tree["train"]["save_every_minutes"] = 3
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(tree))
    file = str(tmp_path / "quickstart.yaml")
    assert load(OLD[2], recipe=file) == new
    assert load(OLD[2], "score.compare=[l1, l2]", recipe=file).score.compare == ("l1", "l2"), (
        "behind a command, it wins"
    )
    assert load(OLD[2], "score.many=", recipe=file).score.compare == ()
    assert load("train={epochs: 2, save_every_minutes: 7}").train.checkpoint_every_minutes == 7


def test_both_names_at_once_are_an_error(tmp_path):
    with pytest.raises(PruneError, match=r"score\.many: it is called score\.compare now, and both are given"):
        load(OLD[0], NEW[0])
    text = loading.find("quickstart").read_text()
    assert text.count("\ntrain: {") == 1
    both = text.replace("\ntrain: {", "\ntrain: {save_every_minutes: 3, checkpoint_every_minutes: 4, ")
    (tmp_path / "x.yaml").write_text(both)
    with pytest.raises(PruneError, match=r"1 error in the recipe\n.*train\.save_every_minutes: it is called"):
        load(recipe=str(tmp_path / "x.yaml"))


def older(tree: dict) -> dict:
    """A resolved recipe as older versions wrote it."""
    out = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in RENAMED.items():
        section = new.partition(".")[0]
        out[section][old.partition(".")[2]] = out[section].pop(new.partition(".")[2])
    return out


def test_a_resolved_recipe_of_an_older_run_is_read_in_silence(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(older(load().resolved())))
    assert load(recipe=str(tmp_path / "recipe.yaml")) == load()
    assert capsys.readouterr().err == ""


def test_fingerprints_are_taken_under_the_old_names(tmp_path, monkeypatch):
    work = work_of(tmp_path, "score.compare=[l1, taylor]")
    monkeypatch.setattr(runner, "digest", lambda text: text)
    monkeypatch.setattr(runner, "file_digest", lambda path: path.name)
    stage = next(stage for stage in runner.ORDER if stage.name == "many")
    fields = json.loads(runner.fingerprint(stage, work))["fields"]
    assert fields["score.many"] == ["l1", "taylor"]
    assert not fields.keys() & RENAMED.values()
    said = repr(Training(checkpoint_every_minutes=3))
    assert "save_every_steps=None, save_every_minutes=3.0, keep_checkpoints=2" in said, "stopped fits are found by it"


def test_a_run_directory_of_an_older_version_is_bound_to_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("CRITERION", "taylor")
    spec = load("score.compare=[l1, '${CRITERION}']", *NEW[1:])
    bind_recipe(tmp_path, spec.written(), (), spec.resolved())
    path = tmp_path / "recipe.yaml"
    notes = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("# "))
    assert ledger._value_digest("score.compare", ["l1", "taylor"]) in notes
    assert ledger._value_digest("score.compare", 1) == ledger._value_digest("score.many", 1), (
        "as the older version marked it"
    )
    text = yaml.safe_dump(older(spec.written()), sort_keys=False) + notes.replace("score.compare", "score.many")
    Ledger(tmp_path).append({"stage": "train", "fingerprint": "x", "outputs": {}})
    for words, refused in (
        ((), ""), (("train.checkpoint_every_minutes=9",), ""), (("score.compare=[l1, l2]",), "score.compare: "),
    ):  # fmt: skip
        path.write_text(text)
        other = load("score.compare=[l1, '${CRITERION}']", *NEW[1:], *words)
        if refused:
            with pytest.raises(PruneError, match=refused):
                bind_recipe(tmp_path, other.written(), (), other.resolved())
        else:
            assert bind_recipe(tmp_path, other.written(), (), other.resolved()) == ""


def test_files_of_before_are_found_until_the_new_ones_are_there(tmp_path):
    assert artifact(tmp_path, "criteria.json").name == "criteria.json"
    (tmp_path / "many.json").touch()
    assert artifact(tmp_path, "criteria.json").name == "many.json"
    (tmp_path / "criteria.json").touch()
    assert artifact(tmp_path, "criteria.json").name == "criteria.json"
