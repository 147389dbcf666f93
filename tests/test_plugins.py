"""Entry points of other packages: names without imports, clashes and broken packages said, all ranks alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from dist_prune import methods, models, plugins
from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.config.pruning import Target
from dist_prune.distributed.same_plugins import check_same_plugins
from dist_prune.errors import PruneError
from dist_prune.pruning.selection.cost import COSTS
from tests.support.packages import by_hand

BROKEN = "import a_module_that_nobody_has\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of packages on the path; what they added to the tables of this process goes away."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, costs = set(sys.modules), dict(COSTS)
    COSTS.joined = False  # type: ignore[attr-defined]
    yield tmp_path
    for name in dict(COSTS).keys() - costs.keys():
        del COSTS[name], Target.costs[name]
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    plugins.load.cache_clear()


def load(*words: str):
    return loading.load("quickstart", ["target.macs=null", *words], methods.options_of)


@pytest.mark.parametrize(
    ("kind", "name", "ask", "own"),
    [
        ("method", "l1", lambda: methods.find("l1"), "dist_prune/methods/l1"),
        ("backbone", "resnet18", lambda: models.check("resnet18", {}), "timm's registry, timm.models.resnet"),
        (
            "backbone",
            "resnet8p_cifar",
            lambda: models.check("resnet8p_cifar", {}),
            "timm's registry, dist_prune.models.resnet_cifar",
        ),
        ("dataset", "digits", lambda: load("data.source=digits"), "dist_prune/data/datasets.py"),
        ("cost", "macs", lambda: load("target.macs=0.5"), "a key of target"),
    ],
)
def test_a_name_of_dist_prune_itself_is_refused_with_both_origins(place, kind, name, ask, own):
    by_hand(place, "greedy", kind, name, "greedy_module:thing", BROKEN)
    with pytest.raises(PruneError) as error:
        ask()
    for part in (f"dist_prune itself ({own})", "greedy 0.9 (greedy_module:thing)", f"dist_prune.{kind}s"):
        assert part in str(error.value)


def test_a_name_of_two_packages_is_refused_and_other_names_go_on(place):
    for letter in "ab":
        by_hand(place, f"rival_{letter}", "method", "rivalled", f"rival_{letter}:Thing", BROKEN)
    with pytest.raises(PruneError, match=r"'rivalled' is a name of rival_a 0\.9 .* and of rival_b 0\.9 .* Uninstall"):
        methods.find("rivalled")
    assert methods.find("l1").__name__ == "L1"
    assert load("target.params=0.5").target.asked() == ("params", 0.5)


def test_a_broken_package_is_a_counted_warning_and_an_error_for_who_asks(place, capsys):
    by_hand(place, "shards", "method", "shattered", "shards:Thing", BROKEN)
    assert main(["list", "methods"]) == 0
    out, err = capsys.readouterr()
    assert "shattered" in out and "taylor" in out
    assert "warning: 1 installed plugin cannot be used" in err
    assert "method 'shattered' of shards 0.9 (shards:Thing) cannot be imported: ModuleNotFoundError" in err
    with pytest.raises(PruneError, match=r"method\.name: method 'shattered' of shards 0\.9 .*a_module_that_nobody_has"):
        load("method.name=shattered")


def test_a_broken_cost_stops_only_those_who_ask_for_it(place):
    by_hand(place, "dust", "cost", "dusty", "dust:COST", BROKEN)
    assert "macs" in COSTS and "dusty" not in COSTS
    assert any("dusty" in line for line in plugins.unusable("cost"))
    assert load("target.params=0.5").target.asked() == ("params", 0.5)
    with pytest.raises(PruneError, match=r"cost 'dusty' of dust 0\.9 .* cannot be imported"):
        load("target.dusty=0.5")


def test_a_cost_is_of_the_right_kind_and_named_like_its_entry_point(place):
    source = "from dist_prune import Cost\nCOST = Cost('other', lambda graph, kept: 1, 'things')\n"
    by_hand(place, "misnamed", "cost", "named", "misnamed:COST", source)
    assert "named" not in COSTS
    with pytest.raises(PruneError, match=r"is a cost named 'other', not a dist_prune\.Cost named 'named'"):
        load("target.named=0.5")


def test_a_cost_that_fails_names_its_package(place):
    source = "from dist_prune import Cost\nCOST = Cost('failing', lambda graph, kept: 1 / 0, 'things')\n"
    by_hand(place, "faulty", "cost", "failing", "faulty:COST", source)
    with pytest.raises(PruneError, match=r"cost 'failing' of faulty 0\.9 .* cannot count .*ZeroDivisionError"):
        COSTS["failing"].of(None)  # type: ignore[arg-type]


def test_nearest_names_include_those_of_packages(place):
    by_hand(place, "near", "method", "sharpness", "near:Thing")
    by_hand(place, "near_data", "dataset", "weather_photos", "near_data:Thing")
    by_hand(place, "near_net", "backbone", "tiny_tower", "near_net:make", "def make(num_classes, in_chans): ...\n")
    by_hand(place, "near_cost", "cost", "energy", "near_cost:COST")
    for ask, suggestion in (
        (lambda: methods.find("sharpnes"), "'sharpness'"),
        (lambda: load("data.source=weather_photo"), "'weather_photos'"),
        (lambda: models.check("tiny_towr", {}), "'tiny_tower'"),
        (lambda: load("target.enrgy=0.5"), "'energy'"),
    ):
        with pytest.raises(PruneError, match=f"Did you mean {suggestion}"):
            ask()


def test_a_module_that_replaces_a_network_of_timm_is_undone_and_said(place):
    source = (
        "from timm.models import register_model\n"
        "@register_model\ndef resnet26(pretrained=False, **kwargs): ...\n"
        "@register_model\ndef unheard_net(pretrained=False, **kwargs): ...\n"
    )
    by_hand(place, "usurper", "backbone", "nets", "usurper", source)
    before = timm.model_entrypoint("resnet26")
    assert "unheard_net" in models.list_names("unheard*")
    assert timm.model_entrypoint("resnet26") is before
    assert [line for line in plugins.unusable("backbone") if "resnet26" in line and "usurper 0.9" in line]


def test_a_backbone_that_is_none_is_refused(place):
    by_hand(place, "number", "backbone", "forty_two", "number:value", "value = 42\n")
    with pytest.raises(PruneError, match=r"backbone 'forty_two' of number 0\.9 .* is a int"):
        models.create("forty_two", 10, 3)


def compare_on_rank(ranks, folder: str) -> str:
    if ranks.rank == 1:
        sys.path.insert(0, folder)
    try:
        check_same_plugins(ranks)
        return ""
    except PruneError as error:
        return str(error)
    finally:
        if ranks.rank == 1:
            sys.path.remove(folder)


def test_ranks_with_different_packages_are_refused_on_every_rank(pool, tmp_path):
    by_hand(tmp_path / "site", "lonely", "method", "alone", "lonely:Thing")
    answers = pool.run(3, compare_on_rank, str(tmp_path / "site"))
    assert len(set(answers)) == 1
    assert "only rank 1 has lonely 0.9: method alone = lonely:Thing" in answers[0]
    (tmp_path / "empty").mkdir()
    assert pool.run(3, compare_on_rank, str(tmp_path / "empty")) == ["", "", ""]


def test_names_are_known_without_torch_and_without_the_packages(place):
    by_hand(place, "lazy", "dataset", "lazily", "lazy:Thing", BROKEN)
    code = (
        "import sys; from dist_prune import plugins; assert plugins.names('dataset') == ['lazily'];"
        "from dist_prune.config.data import source_names; assert source_names()[-1] == 'lazily';"
        "sys.exit(bool({'torch', 'lazy', 'timm'} & set(sys.modules)))"
    )
    path = f"{place}:{Path(__file__).resolve().parents[1]}"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "is_code"),
    [
        ("package.module:Dataset", True), ("./file.py:Dataset", True), ("/a/b.py:Kind.inner", True), ("digits", False),
        ("a:b:c", False), (":b", False), ("a:", False), ("a b:c", False), ("cifar-10:c", False),
    ],
)  # fmt: skip
def test_what_names_code(text, is_code):
    assert plugins.names_code(text) is is_code


def test_a_file_is_read_again_when_it_changes_and_errors_name_what_is_missing(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("value = 1\n")
    assert plugins.import_object(f"{file}:value", "data.source") == 1
    file.write_text("value = 22\nfailing = 1\n")
    os.utime(file, ns=(1, 1))
    assert plugins.import_object(f"{file}:value", "data.source") == 22
    for text, said in (
        (f"{file}:valu", r"data\.source: .*mine\.py has no 'valu'\. Did you mean 'value'"),
        (f"{tmp_path}/other.py:value", r"data\.source: there is no file .*other\.py"),
        ("a_module_that_nobody_has:x", r"data\.source: a_module_that_nobody_has cannot be imported: ModuleNotFound"),
    ):
        with pytest.raises(PruneError, match=said):
            plugins.import_object(text, "data.source")
