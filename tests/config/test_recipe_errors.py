"""A wrong recipe gets one list of sentences: the key, the value, what is allowed, the nearest name."""

import pytest
import yaml

from dist_prune import methods
from dist_prune.config import loading, recipe
from dist_prune.errors import PruneError

GOOD = {
    "backbone": {"name": "resnet8p_cifar"},
    "data": {"source": "digits"},
    "method": {"name": "graph"},
    "select": {"threshold": 0.7},
}


def load(tmp_path, *overrides: str, tree: dict | None = None) -> recipe.Recipe:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(GOOD if tree is None else tree))
    return loading.load(str(file), list(overrides), methods.options_of)


def errors(tmp_path, *overrides: str, tree: dict | None = None) -> str:
    with pytest.raises(PruneError) as error:
        load(tmp_path, *overrides, tree=tree)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scor.images=5", "scor: unknown key. Did you mean 'score'?"),
        ("score.image=5", "score.image: unknown key. Did you mean 'images'?"),
        ("score.form=x", "score.form: unknown key. Did you mean 'from'?"),
        ("method.hash_sise=4", "method.hash_sise: unknown key. Did you mean 'hash_size'?"),
        ("method.name=grahp", "method.name: unknown method 'grahp'. Did you mean 'graph'?"),
        ("data.source=digit", "Did you mean 'digits'?"),
        ("finetune.epochs=many", "finetune.epochs: Input should be a valid integer"),
        ("select.threshold=1.5", "select.threshold: Input should be less than or equal to 1 (got 1.5)"),
        ("select.threshold=-0.1", "select.threshold: Input should be greater than or equal to 0 (got -0.1)"),
        ("score.images=0", "score.images must be a positive number or 'all'"),
        ("target.macs=0", "target.macs: Input should be greater than 0"),
        ("backbone=resnet18", "backbone: "),
        ("nonsense", "override 'nonsense': write key=value"),
        ("data.root=${NO_SUCH_VARIABLE_HERE}/x", "the environment variable NO_SUCH_VARIABLE_HERE is not set"),
    ],
)
def test_one_error(tmp_path, override, said):
    assert said in errors(tmp_path, override)


def test_all_errors_at_once(tmp_path):
    text = errors(tmp_path, "scor.images=5", "finetune.epochs=many", "method.hash_sise=4", "select.threshold=2")
    assert "4 errors in the recipe" in text
    assert [word in text for word in ("scor:", "finetune.epochs:", "method.hash_sise:", "select.threshold:")] == [
        True
    ] * 4


def test_one_target_at_a_time(tmp_path):
    assert "one target at a time" in errors(tmp_path, "target.macs=0.5", "target.params=0.5")


def test_a_resolved_recipe_loads_again(tmp_path):
    spec = load(tmp_path, "select.threshold=null", "target.params=0.6")
    again = load(tmp_path, tree=spec.resolved())
    assert again == spec
    assert load(tmp_path, "target.macs=null", tree=spec.resolved()).target.params == 0.6


def test_missing_sections(tmp_path):
    text = errors(tmp_path, tree={"method": {"name": "l1"}})
    assert "backbone: missing" in text
    assert "data: missing" in text


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(PruneError, match="Did you mean 'quickstart'"):
        loading.load("quikstart", [], methods.options_of)


def test_broken_yaml(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: [1,")
    with pytest.raises(PruneError, match="not valid YAML"):
        loading.load(str(file), [])


def test_bare_names_overrides_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/somewhere")
    spec = load(tmp_path, "score.images=all", "score.from=runs/x", "data.root=${PLACE}/y", "select.threshold=0.5")
    assert (spec.score.images, spec.score.from_, spec.data.root, spec.select.threshold) == (
        "all", "runs/x", "/somewhere/y", 0.5,
    )  # fmt: skip
    assert spec.resolved()["score"]["from"] == "runs/x"
    assert spec.method["hash_size"] == 8
    assert loading.load("quickstart", [], methods.options_of).name == "quickstart"
    assert loading.load("quickstart.yaml", [], methods.options_of).name == "quickstart"


def test_null_takes_a_recipe_s_key_back(tmp_path):
    tree = {**GOOD, "method": {"name": "entropy", "alpha": 2.0, "skip_zero": 0.5}, "select": {"keep_ratio": 0.5}}
    for word in ("method.alpha=", "method.alpha=null"):
        assert load(tmp_path, word, tree=tree).method["alpha"] == 1.01
    assert load(tmp_path, "method.skip_zero=null", tree=tree).method["skip_zero"] is None, "null is one of its values"
    lr = {**GOOD, "train": {"lr": 0.5, "epochs": 3}}
    assert load(tmp_path, "train.lr=", tree=lr).train.lr == 0.1
    assert load(tmp_path, "target.tolerance=null").target.tolerance is None
    counts = {**GOOD, "select": {"counts": {"a": 1, "b": 2}}}
    assert load(tmp_path, "select.counts.a=", tree=counts).select.counts == {"b": 2}
    assert "method.alhpa: unknown key. Did you mean 'alpha'?" in errors(tmp_path, "method.alhpa=", tree=tree)
    assert "backbone.name: missing" in errors(tmp_path, "backbone.name=")


def test_as_released_is_the_paper_s_estimator_or_is_refused(tmp_path):
    paper = {"criterion": "mi_rest", "estimator": "renyi", "alpha": 1.01, "width": "aligned"}
    tree = {**GOOD, "method": {"name": "entropy", "alpha": 2.0}, "select": {"keep_ratio": 0.5}}
    for word, stands in (
        ("method.fidelity=as_released", "fidelity as_released is the paper's estimator"),
        ("method.sampling=reyei_uns", "sampling reyei_uns stands for"),
    ):
        text = errors(tmp_path, word, tree=tree)
        assert stands in text
        assert "method.alpha=2.0 of the recipe stands in the way; leave out what differs (method.alpha=null)" in text
        spec = load(tmp_path, word, "method.alpha=", tree=tree)
        assert paper.items() <= spec.method.items()
        again = methods.options_of("entropy").model_validate({k: v for k, v in spec.method.items() if k != "name"})
        assert paper.items() <= again.model_dump().items(), "a resolved recipe says the same when it is read again"
    assert load(tmp_path, tree=tree).method["width"] == "entropy_target"
    assert "method.width=fix" in errors(tmp_path, "method.fidelity=as_released", "method.width=fix", tree=tree)


def test_another_method_on_a_recipe_leaves_the_old_method_s_keys_and_says_so(tmp_path, capsys):
    tree = {**GOOD, "method": {"name": "graph", "hash_size": 4}, "select": {"threshold": 0.7, "min_channels": 2}}
    spec = load(tmp_path, "method.name=entropy", "method.alpha=2", "target.macs=0.5", tree=tree)
    assert (spec.method["name"], spec.method["alpha"]) == ("entropy", 2)
    assert (spec.select.threshold, spec.select.min_channels, spec.target.macs) == (None, 2, 0.5)
    said = capsys.readouterr().err
    assert (
        said.count("method.name=entropy: the recipe's keys for graph are left out: method.hash_size=4, select.thre")
        == 1
    )
    kept = load(tmp_path, "method.name=graph", tree=tree)
    assert (kept.method["hash_size"], kept.select.threshold) == (4, 0.7)
    assert load(tmp_path, "method.name=hrank", "select.threshold=0.5", tree=tree).select.threshold == 0.5
    assert "unknown key" in errors(tmp_path, "method.name=l1", "method.hash_size=4", tree=tree), (
        "asked for, not dropped"
    )
