"""Short names of compared runs: what they share is left out, what tells them apart is there."""

from dist_prune.cli.run_names import short_names, target_text


def keys(method: str, **more) -> dict:
    return {"method.name": method, "backbone.name": "net", "train.epochs": 6, "finetune.epochs": 2, **more}


def named(*recipes: tuple[dict, str]) -> list[str]:
    return short_names(
        [own for own, _ in recipes], [target for _, target in recipes], [f"f{k}" for k, _ in enumerate(recipes)]
    )


def test_the_method_and_its_target():
    assert named((keys("graph"), "macs 0.3"), (keys("graph"), "macs 0.5"), (keys("l1"), "macs 0.3")) == [
        "graph 0.3", "graph 0.5", "l1 0.3",
    ]  # fmt: skip


def test_targets_of_several_costs_are_named():
    assert named((keys("graph"), "macs 0.3"), (keys("l1"), "params 0.3")) == ["graph macs 0.3", "l1 params 0.3"]


def test_one_target_is_no_news():
    assert named((keys("graph"), "macs 0.3"), (keys("l1"), "macs 0.3")) == ["graph", "l1"]


def test_keys_that_differ_within_a_method():
    found = named(
        (keys("l1", **{"train.epochs": 3}), "macs 0.3"), (keys("l1"), "macs 0.3"), (keys("graph"), "macs 0.3")
    )
    assert found == ["l1 train.epochs 3", "l1 train.epochs 6", "graph"], "epochs alone would be those of two trainings"
    assert named((keys("l1", **{"score.images": 10}), ""), (keys("l1", **{"score.images": 20}), "")) == [
        "l1 images 10", "l1 images 20",
    ]  # fmt: skip


def test_a_threshold_is_said_once():
    rows = [(keys("graph", **{"select.threshold": value}), f"threshold {value}") for value in (0.6, 0.7)]
    assert named(*rows) == ["graph 0.6", "graph 0.7"]


def test_names_that_are_equal_get_their_folders():
    report = keys("l1", **{"report.threads": 1}), keys("l1", **{"report.threads": 2})
    assert named(*((own, "macs 0.3") for own in report)) == ["l1 (f0)", "l1 (f1)"]


def test_what_a_run_was_asked_to_keep():
    assert target_text({"target": {"macs": 0.5}, "recipe": {"select": {"threshold": None}}}) == "macs 0.5"
    assert target_text({"target": {}, "recipe": {"select": {"threshold": 0.7}}}) == "threshold 0.7"
    assert target_text({"target": {}, "recipe": {}}) == ""
