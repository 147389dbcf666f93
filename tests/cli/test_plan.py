"""One score file for all thresholds, and plans that come from files: whole runs in this process, and the plan verb."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_prune import methods
from dist_prune.cli import main as cli
from dist_prune.cli.check import trace_backbone
from dist_prune.config import loading
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.pruning.plan.plan import Plan
from dist_prune.run import run
from dist_prune.scoring.context import DistributedScoringContext
from tests.support.launch import report

SMALL = [
    "backbone.name=resnet8p_cifar", "train.epochs=1", "finetune.epochs=0", "score.images=40", "score.micro_batch=10",
    "report.latency_repeats=1", "report.latency_batches=[1]", "report.trackers=[]", "target=",
]  # fmt: skip


def perform(folder: Path, *words: str) -> dict[str, Any]:
    run(
        loading.load("quickstart", [*SMALL, *words], methods.options_of),
        folder,
        DistributedEnvironment.single_process(),
    )
    return report(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay") / "first"
    return folder, perform(folder, "select.threshold=0.65")


def test_three_thresholds_score_once(first, tmp_path, monkeypatch):
    """Two of the three runs take the scores of the first: no image passes through the network for them."""
    folder, one = first
    seen = []
    monkeypatch.setattr(DistributedScoringContext, "collect", lambda *arguments, **more: seen.append(arguments))
    shared = (f"score.from={folder}", f"backbone.checkpoint={folder / 'dense.safetensors'}", "train.epochs=0")
    others = [perform(tmp_path / f"at_{t}", *shared, f"select.threshold={t}") for t in (0.7, 0.75)]
    assert seen == []
    assert len({body["plan"]["fingerprint"] for body in (one, *others)}) == 3
    files = [place / "round_1/scores.safetensors" for place in (folder, tmp_path / "at_0.7", tmp_path / "at_0.75")]
    assert len({file.read_bytes() for file in files}) == 1
    kept = [body["achieved"]["channels"] for body in (one, *others)]
    assert kept == sorted(kept)
    assert [event["event"] for body in others for event in body["events"] if event["stage"] == "score"] == ["taken"] * 2


def test_a_replayed_plan_gives_the_same_network_unscored(first, tmp_path, capsys):
    folder, body = first
    file = tmp_path / "info.json"
    assert cli.main(["plan", str(folder), "--to-json", str(file)]) == 0
    assert set(json.loads(file.read_text())["conv1"]) == {"saved_idxs", "mask_num"}
    dense = (f"backbone.checkpoint={folder / 'dense.safetensors'}", "train.epochs=0")
    again = perform(tmp_path / "again", f"select.plan={file}", *dense)
    assert again["plan"]["fingerprint"] == body["plan"]["fingerprint"]
    assert again["pruned"]["top1"] == body["pruned"]["top1"]
    assert {"stage": "select", "event": "replayed", "plan": str(file)} in again["events"]
    small = [
        tensor_files.read_tensors(place / "round_1/pruned.safetensors")[0] for place in (folder, tmp_path / "again")
    ]
    assert all(torch.equal(tensor, small[1][key]) for key, tensor in small[0].items())
    assert "nothing is scored" in capsys.readouterr().out
    assert "Similarity of channels" in (folder / "report.html").read_text()
    assert "Similarity of channels" not in (tmp_path / "again/report.html").read_text()


def test_scores_are_made_when_the_plan_file_goes(first, tmp_path):
    folder, body = first
    dense = (f"backbone.checkpoint={folder / 'dense.safetensors'}", "train.epochs=0")
    file = tmp_path / "info.json"
    assert cli.main(["plan", str(folder), "--to-json", str(file)]) == 0
    info = json.loads(file.read_text())
    info["layer3.0.conv1"] = {"saved_idxs": [3], "mask_num": 63}
    file.write_text(json.dumps(info))
    other = perform(tmp_path / "run", f"select.plan={file}", *dense)
    assert other["achieved"]["macs"] < body["achieved"]["macs"]
    third = {group["name"]: group["kept"] for group in other["plan"]["groups"]}
    assert third["layer3.0.conv1"] == 1
    again = perform(tmp_path / "run", "select.threshold=0.65", *dense)
    assert again["plan"]["fingerprint"] == body["plan"]["fingerprint"], "scored now, not taken from the empty file"


def test_a_replayed_plan_leaves_nothing_to_choose(first, tmp_path):
    file = first[0] / "round_1/plan.json"
    with pytest.raises(PruneError, match=r"leave out select\.threshold and select\.round_to"):
        perform(tmp_path / "run", f"select.plan={file}", "select.threshold=0.5", "select.round_to=8")
    with pytest.raises(PruneError, match="there is no plan file"):
        perform(tmp_path / "run", "select.plan=nowhere.json")


def test_new_weights_where_the_first_release_has_them(first, tmp_path):
    folder, _ = first
    words = ("select.threshold=0.65", f"backbone.checkpoint={folder / 'dense.safetensors'}", "train.epochs=0")
    body = perform(tmp_path / "run", *words, "method.quirks=[fresh_classifier]")
    plain, fresh = (
        tensor_files.read_tensors(place / "round_1/pruned.safetensors")[0] for place in (folder, tmp_path / "run")
    )
    differing = {key for key, tensor in plain.items() if not torch.equal(tensor, fresh[key])}
    assert differing == {"linear.weight", "linear.bias"}
    assert {"stage": "prune", "event": "new weights", "layers": ["linear"]} in body["events"]


def test_the_plan_verb(first, tmp_path, capsys):
    folder, body = first
    info, out = tmp_path / "info.json", tmp_path / "plan.json"
    assert cli.main(["plan", str(folder), "--to-json", str(info), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fingerprint"] == body["plan"]["fingerprint"]
    assert told["removed"]["macs"] == pytest.approx(1 - body["achieved"]["macs"])
    words = ["backbone.name=resnet8p_cifar"]
    assert cli.main(["plan", "quickstart", *words, "--from-json", str(info), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["fingerprint"] == body["plan"]["fingerprint"]
    text = capsys.readouterr().out
    assert "groups are cut: macs -" in text
    assert f"wrote {out}" in text
    theirs = tmp_path / "theirs.json"
    assert cli.main(["plan", str(folder), "--to-json", str(theirs), "--names", "authors"]) == 0
    assert {"conv", "layer2.0.downsample.0"} < json.loads(theirs.read_text()).keys()
    assert cli.main(["plan", "quickstart", *words, "--from-json", str(theirs), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["fingerprint"] == body["plan"]["fingerprint"]
    assert "matched by suffix or order: conv -> conv1" in capsys.readouterr().out
    for arguments, said in (
        (["quickstart"], "no run directory with a plan"),
        (["quickstart", "--from-json", "nowhere.json"], "there is no plan file"),
        (["quickstart", "--from-json", str(info)], "misses 3 of the network's 9 scored layers"),
    ):
        assert cli.main(["plan", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["vgg16_bn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vgg19_bn_pool7", "torchvision:resnet50"))]
)
def test_the_authors_names_of_their_imagenet_networks_are_those_here(name, tmp_path, capsys):
    """Torchvision's, under which their programs load the weights."""
    narrow = "" if name.startswith("torchvision") else ", kwargs: {mlp_ratio: 0.01}"
    words = ["quickstart", f"backbone={{name: '{name}'{narrow}}}", "data={source: imagefolder, image_size: 32}"]
    words += ["data.root=/nowhere", "target=", "select.threshold=0.7"]
    recipe = loading.load(words[0], words[1:], methods.options_of, need_environment=False)
    graph = trace_backbone(recipe, methods.build(recipe.method))[0]
    files = tmp_path / "plan.json", tmp_path / "theirs.json"
    files[0].write_text(Plan.from_kept(graph, {}).to_json())
    given = [*words, "--from-json", str(files[0]), "--to-json", str(files[1]), "--names", "authors"]
    assert cli.main(["plan", *given]) == 0, capsys.readouterr().err
    body = json.loads(files[1].read_text())
    assert next(iter(body)) == ("conv1" if name.startswith("torchvision") else "features.0")
    assert cli.main(["plan", *words, "--from-json", str(files[1])]) == 0
