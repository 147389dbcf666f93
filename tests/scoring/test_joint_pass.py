"""Many criteria in one pass: the same scores as alone, on any number of ranks, and the verb that compares them."""

import json
from pathlib import Path

import numpy as np
import torch

from dist_prune import methods
from dist_prune.cli import main as cli
from dist_prune.cli.score_many import comparable_methods
from dist_prune.data.datasets import open_source
from dist_prune.data.sampling import holdout_split
from dist_prune.distributed.communicator import Communicator
from dist_prune.pipeline.ledger import Ledger
from dist_prune.scoring.joint_pass import score_many
from tests.support import tiny

DATA_DRIVEN = ("apoz", "chip", "graph", "group_fisher", "hessian_trace", "hrank", "mint", "obd", "taylor")


def chosen(names=DATA_DRIVEN):
    return {name: tiny.method(name) for name in names}


def test_together_is_alone_and_the_images_are_seen_twice():
    """One pass for all first derivatives and plain taps, one for the Hessian's products."""
    context, passes = tiny.bench(tiny.network()), []
    plain = context.collect
    context.collect = lambda *a, **k: passes.append(a) or plain(*a, **k)  # type: ignore[method-assign]
    found = score_many(context, chosen())
    assert len(passes) == 2
    for name, method in chosen().items():
        alone = tiny.bench(tiny.network())
        alone.graph = method.prunable(alone.graph)
        scores = method.score(alone)
        assert scores.keys() == found[name].keys()
        assert all(torch.equal(table, found[name][key]) for key, table in scores.items()), name


def test_methods_that_look_at_no_image_need_no_pass():
    names = ("l1", "fpgm", "whc", "bn_scale", "group_norm", "random")
    context = tiny.bench(tiny.network())
    found = score_many(context, chosen(names))
    assert list(found) == list(names)
    assert context._observations == 0


def killed_or_not(ranks: Communicator, partial) -> list[str]:
    context = tiny.bench(tiny.network(), ranks, partial=partial)
    found = score_many(context, chosen(("apoz", "obd", "taylor")))
    return [str(context.resumed), *(f"{n} {k} {t.double().sum()}" for n, own in found.items() for k, t in own.items())]


def test_ranks_share_the_pass_and_a_finished_one_is_not_done_again(tmp_path, pool):
    one = killed_or_not(Communicator(), None)
    for found in pool.run(3, killed_or_not, tmp_path):
        assert found == one
    again = killed_or_not(Communicator(), tmp_path)
    assert again[0] == str(tiny.IMAGES), "another process knows the partial observation by its settings"
    assert again[1:] == one[1:]


def test_the_verb_prints_a_table(tmp_path, capsys):
    words = [
        "backbone.name=resnet8p_cifar", "train.epochs=1", "score.images=30", "score.micro_batch=10", "method.name=l1",
        "report.trackers=[]", "--methods", "l1,taylor,hrank", "--run-dir", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    assert cli.main(["score-many", "quickstart", *words]) == 0
    out, said = capsys.readouterr()
    table = json.loads(out)
    assert [row["method"] for row in table] == ["l1", "taylor", "hrank"]
    for row in table:
        assert 0 < row["macs"] <= 0.55
        assert 0 <= row["top1"] <= 100
        assert row["overlap"][row["method"]] == 1
    assert table[0]["overlap"]["taylor"] == table[1]["overlap"]["l1"] < 1
    assert (tmp_path / "run/criteria.safetensors").is_file()
    assert not (tmp_path / "run/round_1/scores.safetensors").exists(), "only what the table needs"
    body = json.loads((tmp_path / "run/criteria.json").read_text())
    source = open_source("digits", None, "", True)
    assert body["images"]["count"] == len(holdout_split(np.arange(len(source.labels)), 0.1, 0)[1])
    assert body["images"]["where"] == "training images that train.holdout holds out"
    assert "score.compare: top-1 on" in said
    assert cli.main(["score-many", "quickstart", "--methods", "l1,l1"]) == 2
    assert cli.main(["score-many", "quickstart", *words[:6], "--methods", "l1,tailor"]) == 2
    assert "Did you mean 'taylor'" in capsys.readouterr().err
    assert set(DATA_DRIVEN) <= set(methods.list_names())
    as_before(tmp_path / "run")
    assert cli.main(["score-many", "quickstart", *words]) == 0
    out, said = capsys.readouterr()
    assert "many: done before, skipped" in said
    assert json.loads(out) == table


def as_before(folder: Path) -> None:
    """Make the run directory one of an older version, whose files of this stage had other names."""
    for file in ("criteria.json", "criteria.safetensors"):
        (folder / file).rename(folder / file.replace("criteria", "many"))
    ledger = Ledger(folder)
    lines = [{key: value for key, value in line.items() if key != "at"} for line in ledger.lines()]
    ledger.file.unlink()
    for line in lines:
        ledger.append({**line, "outputs": {k.replace("criteria", "many"): v for k, v in line["outputs"].items()}})
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("  compare:", "  many:"))


def test_every_ranking_method_can_be_compared(tmp_path, capsys):
    """Those that train gates, count coalitions or delete step by step as well; each on the images that it looks at."""
    names = ["l2", "fisher", "dirichlet", "shapley", "entropy", "random"]
    words = [
        "backbone.name=resnet8p_cifar", "backbone.kwargs={img_size: 8}", "train.epochs=1", "score.images=40",
        "score.micro_batch=10", "method.name=entropy", "method.alpha=2", "report.trackers=[]", "target.macs=0.6",
        "select.exclude=['layer[23]*']", "--methods", ",".join(names), "--run-dir", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    assert cli.main(["score-many", "quickstart", *words]) == 0
    out = capsys.readouterr().out
    assert [row["method"] for row in json.loads(out[out.index("[\n") :])] == names
    images = json.loads((tmp_path / "run/criteria.json").read_text())["images"]
    held = holdout_split(np.arange(len(open_source("digits", None, "", True).labels)), 0.1, 0)[1]
    assert images["count"] == len(held) - 40, "none of those that coalitions were measured on"
    assert {"apoz", "dirichlet", "entropy", "l1", "mint", "shapley", "taylor"} <= set(comparable_methods())
    assert not {"graph", "sensitivity"} & set(comparable_methods())
