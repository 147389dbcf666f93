"""Which stages read a recipe key: declared on the key, and the same as when fingerprints were first made."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from dist_prune import methods
from dist_prune.config.earlier_versions import OLD_NAMES
from dist_prune.config.recipe import Recipe
from dist_prune.config.stage_keys import ReadBy, declared
from dist_prune.pipeline.ledger import NON_IDENTITY_KEYS
from dist_prune.pipeline.runner import stages_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stage_reads.json").read_text())


def declarations(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, list[ReadBy]]]:
    """Every key without keys below it, with its own declaration and those of its sections."""
    for name, info in section.model_fields.items():
        key, own = prefix + (info.alias or name), [one for one in [declared(info)] if one]
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from ((inner, own + more) for inner, more in declarations(info.annotation, f"{key}."))
        else:
            yield key, own


@pytest.mark.parametrize(("rounds", "name"), [(1, "one shot"), (3, "three rounds")])
@pytest.mark.parametrize("carry", [False, True])
def test_stages_read_the_keys_that_their_fingerprints_were_made_of(rounds, name, carry):
    # fingerprints are hashed under a key's old name
    reads = {stage.label: sorted(OLD_NAMES.get(key, key) for key in stage.reads) for stage in stages_of(rounds, carry)}
    assert reads == {label: sorted(keys.split()) for label, keys in GOLDEN[name].items()}


def test_scores_read_the_options_that_their_fingerprints_were_made_of():
    wanted = GOLDEN["options that score reads"]
    assert {name: " ".join(sorted(methods.find(name).Options.score_options())) for name in wanted} == wanted
    grow = {name: " ".join(sorted(methods.find(name).Options.refinable_options())) for name in wanted}
    assert {name: options for name, options in grow.items() if options} == GOLDEN["options of them that may grow"]


def test_every_key_is_read_by_a_stage_or_says_why_not():
    for key, own in declarations():
        assert any(one.stages for one in own) != any(one.why_not for one in own), (
            f"{key}: declare the stages that read it, or why none does (dist_prune/stage_keys.py)"
        )


def test_what_no_stage_reads_may_change_between_two_commands():
    """The ledger lets the same keys change; another run's scores are let in by their fingerprint."""
    exempt = {key for key, own in declarations() if any(one.why_not for one in own)}
    places = {place for place in NON_IDENTITY_KEYS if place.partition(".")[0] not in ("train", "finetune")}
    assert {key for key in exempt if key.partition(".")[0] not in places} - {"score.from"} == places - {"cluster"}


def test_declarations_name_stages():
    known = {stage.name for stage in stages_of(1, repair=True)}
    known |= {f"{name}_in_rounds" for name in known} | {"finetune_between", "search"}
    for key, own in declarations():
        for one in own:
            assert {*one.stages, *(name for names in one.keys.values() for name in names)} <= known, key
