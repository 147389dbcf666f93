"""Names that other libraries use are found: the same thing by an alias, a relative by a suggestion."""

import json

import pytest

from dist_prune import methods
from dist_prune.config import familiar_names, loading, recommendation
from dist_prune.config.familiar_names import (
    KEY_RELATIVES,
    KEYWORD_RELATIVES,
    METHOD_ALIASES,
    METHOD_RELATIVES,
    TARGET_RELATIVES,
    canonical_method,
    key_suggestion,
)
from dist_prune.errors import PruneError
from dist_prune.pipeline.method_choice import FILE, keep_choice

KEYS = [line.split(" | ")[0].strip("| `") for line in loading.reference().splitlines()[2:]]
SECTIONS = {"finetune", "method", *(key.split(".")[0] for key in KEYS)}


def load(*words: str):
    return loading.load("quickstart", list(words), methods.options_of)


@pytest.mark.parametrize("alias", METHOD_ALIASES)
def test_an_alias_is_recorded_under_our_name(alias):
    name = METHOD_ALIASES[alias]
    assert alias not in methods.list_names()
    assert load(f"method.name={alias}").method["name"] == name
    assert methods.build({"name": alias}).__class__ is methods.find(name)
    assert load("score.compare=[random," + alias + "]").score.compare == ("random", name)


@pytest.mark.parametrize("name", METHOD_RELATIVES)
def test_a_relative_is_suggested(name):
    assert METHOD_RELATIVES[name][0] in methods.list_names()
    with pytest.raises(PruneError, match=f"{name} is not here; nearest: {METHOD_RELATIVES[name][0]} "):
        load(f"method.name={name}")


def test_no_name_is_in_two_tables():
    assert not METHOD_ALIASES.keys() & METHOD_RELATIVES.keys()
    assert not METHOD_RELATIVES.keys() & set(methods.list_names())


def test_spelling_does_not_matter():
    assert canonical_method("L1-Norm") == "l1"
    assert canonical_method("DepGraph") == "group_norm"
    assert canonical_method("taylor") == "taylor"


def test_a_method_of_another_package_keeps_its_name(monkeypatch):
    class Point:
        name = "magnitude"

    monkeypatch.setattr(familiar_names, "entry_points", lambda group: [Point])
    assert canonical_method("magnitude") == "magnitude"
    assert canonical_method("slimming") == "bn_scale"


def named_keys(text: str) -> list[str]:
    words = text.replace(",", " ").replace(";", " ").replace("(", " ").split()
    return [word for word in words if "." in word and word.split(".")[0] in SECTIONS]


@pytest.mark.parametrize("key", KEY_RELATIVES)
def test_a_key_of_elsewhere_names_ours(key):
    """Every suggestion names keys that exist, and none is itself a key at the top."""
    text = KEY_RELATIVES[key]
    known = {"method.name", *KEYS, *(word.replace("train.", "finetune.") for word in KEYS)}
    assert all(word in known for word in named_keys(text)), text
    assert named_keys(text) or text in SECTIONS or text.startswith("none: ")
    assert key not in SECTIONS
    with pytest.raises(PruneError) as error:
        load(f"{key}=1")
    assert f"Write {text}." in str(error.value)


@pytest.mark.parametrize("key", TARGET_RELATIVES)
def test_a_target_of_elsewhere_names_ours(key):
    assert all(word in KEYS for word in named_keys(TARGET_RELATIVES[key]))
    with pytest.raises(PruneError) as error:
        load(f"target.{key}=0.5")
    assert f"target.{key}: unknown key. Write {TARGET_RELATIVES[key]}." in str(error.value)


def test_a_key_in_its_section_is_suggested_too():
    with pytest.raises(PruneError, match=r"train\.learning_rate: unknown key\. Write train\.lr, finetune\.lr"):
        load("train.learning_rate=0.1")
    with pytest.raises(PruneError, match=r"train\.epoch: unknown key\. Did you mean 'epochs'"):
        load("train.epoch=1")
    assert key_suggestion("qqqqqq", ["epochs"]) == ""


def test_a_sparsity_that_is_a_key_stays_one():
    assert load("train.sparsity=bn_scale").train.sparsity == "bn_scale"


def test_keywords_of_other_libraries():
    from dist_prune import api_select

    for name in KEYWORD_RELATIVES:
        with pytest.raises(PruneError, match=name) as error:
            api_select.select(None, None, **{name: 0.5})  # type: ignore[arg-type]
        assert KEYWORD_RELATIVES[name] in str(error.value)


def test_auto_takes_the_recommendation():
    with_time, without = load("method.name=auto", "finetune.epochs=1"), load("method.name=auto", "finetune.epochs=0")
    assert with_time.method["name"] == recommendation.LABELS_AND_TIME.method
    assert without.method["name"] == recommendation.LABELS.method
    assert "labelled images and a finetuning" in with_time.choice
    assert "no finetuning" in without.choice
    assert load("method.name=taylor").choice == ""
    assert load("method.name=auto").resolved()["method"] == load("method.name=group_fisher").resolved()["method"]
    assert recommendation.recommend({}, labels=False).method == "reconstruction"
    assert (with_time.select.scope, with_time.select.max_ratio) == ("global", 0.9)
    assert (load("method.name=auto", "select.scope=local").select.max_ratio) is None, "the recipe's own selection stays"
    for one in (recommendation.IMAGES, recommendation.LABELS, recommendation.LABELS_AND_TIME):
        assert one.method in methods.list_names()
    needs = methods.find(recommendation.IMAGES.method).needs
    assert needs is not None and not needs.labels


def test_auto_has_no_keys():
    with pytest.raises(PruneError, match=r"method\.combine: auto has no keys"):
        load("method.name=auto", "method.combine=sum")


def test_a_choice_outlives_the_recommendation(tmp_path, monkeypatch):
    first = keep_choice(tmp_path, load("method.name=auto"))
    assert json.loads((tmp_path / FILE).read_text())["method"] == first.method["name"] == "group_fisher"
    monkeypatch.setattr(loading, "recommend", lambda tree: recommendation.IMAGES)
    today = load("method.name=auto")
    assert today.method["name"] == "reconstruction"
    kept = keep_choice(tmp_path, today)
    assert kept.method == first.method and kept.select == first.select and today.select.scope == "global"
    assert "today's choice would be reconstruction" in kept.choice
    named = load("method.name=l1")
    assert keep_choice(tmp_path, named) is named, "a recipe that names its method is left alone"
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(PruneError, match="damaged"):
        keep_choice(tmp_path, today)
