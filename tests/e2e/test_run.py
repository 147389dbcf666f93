"""Whole runs as a user starts them: real launchers, real ranks, real kills."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dist_prune
from dist_prune.data import sampling
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.report import answers
from dist_prune.run import main
from tests.support.launch import ACCELERATE, PYTHON, SMALL, TORCHRUN, environment, finish, report, run

# of SMALL's train stage, written by the first release
TRAINED_BEFORE = "b790f51fba37ad6d9e0c75ddd7a49a2a08f4144af9fb885f260247df2398680b"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run on two ranks through accelerate; tests look at what it left."""
    return finish(ACCELERATE, tmp_path_factory.mktemp("run") / "quick", *SMALL)


def test_a_run_leaves_what_is_promised(finished):
    folder, output = finished
    for name in (
        "recipe.yaml", "environment.json", "ledger.jsonl", "dense.safetensors", "round_1/scores.safetensors",
        "round_1/plan.json", "round_1/pruned.safetensors", "finetuned.safetensors", "metrics.json", "report.json",
        "report.html", "export/bundle.json", "export/model.safetensors", "answers.safetensors",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").glob("events*"))
    assert not list(folder.rglob("*.tmp")) + list(folder.rglob("*checkpoint*")) + list(folder.rglob("*partial*"))
    assert "2 process(es)" in output
    for word in (
        "dense",
        "pruned",
        "finetuned",
        "top-1 %",
        "MACs (M)",
        "report.html",
        "dist_prune.load",
        "TensorBoard",
    ):
        assert word in output


def test_report_json(finished):
    body = report(finished[0])
    assert {"name", "recipe", "seed", "world_size", "commit", "environment", "plan", "target", "achieved", "timings",
            "events"} <= body.keys()  # fmt: skip
    assert body["world_size"] == 2
    for kind in ("dense", "pruned", "finetuned"):
        assert {"top1", "top5", "loss", "macs", "params", "size_bytes", "latency"} <= body[kind].keys()
        assert set(body[kind]["latency"]) == {"1", "8"}
        assert {"ms", "images_per_s", "device", "threads"} <= body[kind]["latency"]["8"].keys()
    assert body["finetuned"]["macs"] / body["dense"]["macs"] == pytest.approx(body["achieved"]["macs"])
    assert body["achieved"]["macs"] <= body["target"]["macs"]
    assert {"name", "layers", "width", "unit", "kept", "reason"} == body["plan"]["groups"][0].keys()
    for place, kind in enumerate(("dense", "finetuned")):
        assert sum(layer["macs"][place] for layer in body["network"]) == body[kind]["macs"]
    assert body["dense"]["size_bytes"] == (finished[0] / "dense.safetensors").stat().st_size
    said = body["communication"]
    assert {"train", "score", "finetune", "evaluate"} <= said.keys()
    layers = [table for name, table in scores(finished[0]).items() if name.endswith(":hamming")]
    integers = sum(table.numel() + 1 for table in layers)  # C x C agreements and a number of images for each layer
    assert said["score"]["sum"] == {"calls": 1, "bytes": 8 * integers}
    steps = 2 * sampling.steps_per_epoch(1347 - round(1347 * 0.1), 64)  # two epochs of the digits that are not held out
    assert said["train"]["gradients"] == {"calls": steps, "bytes": steps * 4 * body["dense"]["params"]}
    assert said["finetune"]["gradients"] == {"calls": steps, "bytes": steps * 4 * body["finetuned"]["params"]}
    page = (finished[0] / "report.html").read_text()
    assert "communication of each rank (graph on resnet8p_cifar), all-reduced + other: train " in page
    assert page.count("<svg") >= 3
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ), "self-contained"


def test_answers_are_those_of_the_figures(finished):
    """What each network answers for each image, over two ranks, against top-1, and the sums that the report makes."""
    body, found = report(finished[0]), tensor_files.read_tensors(finished[0] / "answers.safetensors")[0]
    right = {kind: found[f"{kind}/predicted"] == found["labels"] for kind in ("dense", "pruned", "finetuned")}
    for kind, hits in right.items():
        assert 100 * int(hits.sum()) / len(hits) == body[kind]["top1"]
        assert sum(line[kind] for line in body["classes"]) == int(hits.sum())
        assert sum(one["images"] for one in body["calibration"][kind]["bins"]) == body[kind]["images"] == 450
    lost = int((right["dense"] & ~right["finetuned"]).sum())
    assert body["answers"]["finetuned"]["lost"] == lost
    page = (finished[0] / "report.html").read_text()
    assert "Calibration of confidence" in page
    tables = {name: table.numpy() for name, table in found.items()}
    losers = answers.losers(body["classes"])
    for line in losers:
        for place in answers.examples(line["number"], tables):
            assert right["dense"][place] and not right["finetuned"][place]
            taken, sure = (int(found[f"finetuned/{key}"][place]) for key in ("predicted", "confidence"))
            assert f"<figcaption>{taken}, {100 * sure / 2**24:.0f} %</figcaption>" in page
    shown = sum(len(answers.examples(line["number"], tables)) for line in losers)
    assert page.split("<h2>Classes that lost most</h2>")[1].split("<h2>")[0].count("<img") == shown


def scores(folder: Path) -> dict[str, torch.Tensor]:
    return tensor_files.read_tensors(folder / "round_1/scores.safetensors")[0]


def test_tensorboard_has_curves_figure_and_hparams(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(finished[0] / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    for section in ("train", "finetune"):
        assert {f"{section}/{key}" for key in ("loss", "lr", "images_per_s", "holdout_top1")} <= set(tags["scalars"])
        assert len(found.Scalars(f"{section}/loss")) == 2
    assert "final/top1" in tags["scalars"]
    assert {"plan/kept channels", "likeness/conv1"} <= set(tags["images"])
    assert "plan/groups/text_summary" in tags["tensors"]
    keys, figures = hparams(found)
    assert keys[:4] == ["method.name", "target.macs", "backbone.name", "seed"] and keys[4:] == sorted(keys[4:])
    assert figures[:3] == ["final/top1", "final/top5", "final/loss"]


def hparams(found) -> tuple[list[str], list[str]]:
    """The columns of TensorBoard's table in their order: keys, figures."""
    from tensorboard.plugins.hparams import metadata

    content = found.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    return [info.name for info in experiment.hparam_infos], [info.name.tag for info in experiment.metric_infos]


def test_the_bundle_loads_without_the_run(finished):
    folder, _ = finished
    model = dist_prune.load(folder / "export")
    kept = sum(parameter.numel() for parameter in model.parameters())
    assert kept == report(folder)["finetuned"]["params"] < report(folder)["dense"]["params"]
    code = (
        "import sys, torch, dist_prune; m = dist_prune.load(sys.argv[1]); "
        "print(float(m(torch.ones(1, 1, 8, 8)).detach().sum())); assert 'torch_pruning' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder / "export")], capture_output=True, text=True, check=True, cwd="/",
        env=environment(),
    )  # fmt: skip
    assert float(found.stdout) == pytest.approx(float(model(torch.ones(1, 1, 8, 8)).detach().sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "damaged or cut short"),
        (lambda f: (f / "bundle.json").write_text("{"), "damaged"),
        (lambda f: (f / "bundle.json").unlink(), "is no bundle"),
        (lambda f: _edit(f, lambda body: body.update(format=9)), "bundle format 9"),
        (lambda f: _edit(f, lambda body: body["plan"]["removed"].popitem()), "altered"),
        (lambda f: _edit(f, lambda body: body.pop("plan")), "damaged"),
        (lambda f: (f / "bundle.json").write_text("[]"), "holds no mapping"),
        (lambda f: _flip(f / "model.safetensors"), "altered or replaced"),
    ],
)
def test_a_damaged_bundle_is_refused(finished, tmp_path, damage, said):
    folder = tmp_path / "export"
    folder.mkdir()
    for file in (finished[0] / "export").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises(PruneError, match=said):
        dist_prune.load(folder)


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


def _edit(folder: Path, change) -> None:
    body = json.loads((folder / "bundle.json").read_text())
    change(body)
    (folder / "bundle.json").write_text(json.dumps(body))


def test_run_again_skips_and_other_select_keys_go_on(finished):
    folder, _ = finished
    plan = report(folder)["plan"]["fingerprint"]
    safety = ("train.checkpoint_every_minutes=3", "finetune.keep_checkpoints=1", "finetune.skip_nonfinite=2")
    code, output = run(TORCHRUN, folder, *SMALL, *safety)
    assert code == 0, output
    stages = {"train", "score", "select", "prune", "finetune", "evaluate", "curves", "export"}
    assert output.count("done before, skipped") == len(stages)
    assert {event["stage"] for event in report(folder)["events"]} == stages
    code, output = run(PYTHON, folder, *SMALL, "target.macs=0.8")
    assert code == 0, output
    assert "continues from its scores; changed since: target.macs: 0.55 there, 0.8 here" in output
    assert "score: done before, skipped" in output
    assert "select: channels to keep" in output
    assert report(folder)["plan"]["fingerprint"] != plan
    code, output = run(PYTHON, folder, *SMALL, "score.images=50")
    assert code == 2
    assert "score.images: 100 there, 50 here" in output


@pytest.mark.slow
def test_scores_of_another_run(finished, tmp_path):
    folder, _ = finished
    start_weights = f"backbone.checkpoint={folder / 'dense.safetensors'}"
    same = ("score.from=" + str(folder), start_weights, "finetune.epochs=0", "train.epochs=0")
    code, output = run(PYTHON, tmp_path / "b", *SMALL, *same, "target.macs=0.7")
    assert code == 0, output
    body = report(tmp_path / "b")
    assert {"stage": "score", "event": "taken", "from": str(folder)} in body["events"]
    assert body["pruned"]["top1"] == body["finetuned"]["top1"], "finetune.epochs=0 changes nothing"
    code, output = run(PYTHON, tmp_path / "c", *SMALL, *same, "score.images=60")
    assert code == 2
    assert "score.from: the scores of" in output


@pytest.mark.parametrize(
    ("value", "said"), [("2", "WORLD_SIZE is 2 but"), ("x", "WORLD_SIZE is 'x', which is no number")]
)
def test_world_size_without_a_launcher(tmp_path, value, said):
    code, output = run(PYTHON, tmp_path / "run", *SMALL, WORLD_SIZE=value)
    assert code == 2
    assert said in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("backbone.name=resnet8q_cifar",), "unknown backbone 'resnet8q_cifar'. Did you mean 'resnet8p_cifar'?"),
        (("backbone.checkpoint=/nowhere.safetensors",), "there is no file /nowhere.safetensors"),
        (("data.source=imagefolder", "data.root=/nowhere"), "there is no /nowhere"),
        (("train.epochs=0",), "there is no dense network: set backbone.checkpoint"),
        (("target.macs=0.00001",), "reachable range"),
        (("select.threshold=0.5",), "set either select.threshold (the paper's knob, 0 to 1) or one target, not both"),
        (("target.macs=null",), "set either select.threshold"),
        (("method.name=l1", "select.threshold=0.5"), "this method ranks channels and has no threshold"),
        (("select.keep_ratio=0.5",), "select.keep_ratio: graph has none"),
        (("select.exclude=[nothere*]",), "select.exclude: nothere* match no layer"),
        (("select.exclude=['*']",), "no channel group is free to be cut"),
        (("backbone.kwargs.img_sise=8",), "unexpected keyword argument 'img_sise'"),
        (("data.mean=[0.1,0.2,0.3]",), "data.mean: 3 values for images of 1 channel(s)"),
        (("data.crop=0.5",), "data.crop is for image files"),
        (("train.batch=1",), "train.batch: 1"),
        (("train.lr=1e6", "train.warmup_epochs=0"), "the loss is not finite (or huge) at epoch 1"),
    ],
)
def test_errors_are_for_people(tmp_path, capfd, words, said):
    """In this process: the command's own is started by the tests around this one."""
    code = main(["--recipe", "quickstart", "--run-dir", str(tmp_path / "run"), *SMALL, *words])
    output = "".join(capfd.readouterr())
    assert code == 2, output
    assert said in output
    assert "Traceback" not in output
    assert "train 1/" not in output, "what can be found out before any work is found out before"


def test_several_errors_of_the_world_at_once(tmp_path):
    words = ("backbone.checkpoint=/nowhere.pth", "data.source=npz", "data.root=/nowhere.npz")
    code, output = run(PYTHON, tmp_path / "run", *SMALL, *words)
    assert code == 2
    assert "there is no file /nowhere.pth" in output
    assert "there is no /nowhere.npz" in output


@pytest.mark.slow
def test_other_content_behind_the_same_recipe_is_refused(tmp_path):
    """The run directory knows the images and the checkpoint it was made from, not only their places."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = rng.integers(0, 256, (60, 8, 8), np.uint8)
        arrays[f"y_{part}"] = np.arange(60) % 10
    np.savez(tmp_path / "a.npz", **arrays)
    words = (*SMALL, "data.source=npz", "data.augment=none", "finetune.epochs=0", "train.epochs=1", "score.images=20")
    code, output = run(PYTHON, tmp_path / "run", *words, f"data.root={tmp_path / 'a.npz'}")
    assert code == 0, output
    arrays["x_test"] = 255 - arrays["x_test"]
    np.savez(tmp_path / "b.npz", **arrays)
    code, output = run(PYTHON, tmp_path / "run", *words, f"data.root={tmp_path / 'b.npz'}")
    assert code == 2
    assert "data.root (test images): the content is not the one" in output


def test_weights_that_are_not_finite_are_refused(finished, tmp_path):
    from dist_prune.distributed import tensor_files

    weights, _ = tensor_files.read_tensors(finished[0] / "dense.safetensors")
    weights["conv1.weight"][0, 0, 0, 0] = float("nan")
    tensor_files.save_tensors(tmp_path / "nan.safetensors", weights)
    code, output = run(PYTHON, tmp_path / "run", *SMALL, f"backbone.checkpoint={tmp_path / 'nan.safetensors'}")
    assert code == 2
    assert "values that are not finite, in conv1.weight" in output


def test_a_checkpoint_of_another_class_count(finished, tmp_path):
    from dist_prune.distributed import tensor_files

    weights, _ = tensor_files.read_tensors(finished[0] / "dense.safetensors")
    weights["linear.weight"], weights["linear.bias"] = torch.zeros(7, 64), torch.zeros(7)
    tensor_files.save_tensors(tmp_path / "seven.safetensors", weights)
    code, output = run(
        PYTHON, tmp_path / "run", *SMALL, "train.epochs=0", f"backbone.checkpoint={tmp_path / 'seven.safetensors'}"
    )
    assert code == 2
    assert "class count mismatch: the data has 10 classes, the head 'linear' of" in output
    assert "has 7" in output


def test_cli(finished, capsys):
    from dist_prune.cli.main import main

    assert main(["report", str(finished[0])]) == 0
    assert "finetuned" in capsys.readouterr().out
    assert main(["check", "quickstart", "--json", "target.macs=0.6"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["recipe"]["target"]["macs"] == 0.6
    assert body["dense"].keys() == {"macs", "thop", "params"}
    assert main(["check", "--assume", "resnet56_cifar10_graph"]) == 0
    text = capsys.readouterr().out
    assert "PROTECTED: its layers are 16, 32, 64 channels wide" in text
    assert "27 of 29 groups are free" in text
    for what in ("methods", "recipes", "backbones"):
        assert main(["list", what, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    assert "torch-pruning" in capsys.readouterr().out
    assert main(["check", "quickstart", "target.macs=0.00001"]) == 2
    assert "reachable range" in capsys.readouterr().err
    assert main(["report", "/nowhere"]) == 2


@pytest.mark.slow
def test_quickstart_keeps_its_promises(tmp_path):
    """The shipped recipe: dense at least 97 %, MACs down 40 %, finetuned within a point of dense."""
    code, output = run(ACCELERATE, tmp_path / "run")
    assert code == 0, output
    body = report(tmp_path / "run")
    assert body["dense"]["top1"] >= 97
    assert body["finetuned"]["macs"] <= 0.6 * body["dense"]["macs"]
    assert body["finetuned"]["top1"] >= body["dense"]["top1"] - 1


@pytest.mark.slow
def test_a_resnet56_recipe_on_cifar10(tmp_path, data):
    """A shipped recipe on the real data and weights, without its finetune."""
    words = ("finetune.epochs=0", "report.latency_repeats=3", "score.images=200")
    code, output = run(ACCELERATE, tmp_path / "run", *words, recipe="resnet56_cifar10_graph", DIST_PRUNE_DATA=str(data))
    assert code == 0, output
    body = report(tmp_path / "run")
    assert body["dense"]["top1"] == pytest.approx(93.39, abs=0.005)
    assert body["dense"]["macs"] == 125_485_696
    assert 10 < body["pruned"]["top1"] < 93.39
    assert body["pruned"]["macs"] < body["dense"]["macs"]


def test_run_directories_of_the_release_before_go_on(finished):
    """Keys that came later do not change what a stage is decided by: its fingerprint is the earlier release's."""
    lines = [json.loads(line) for line in (finished[0] / "ledger.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["stage"] == "train")
    assert train["fingerprint"] == TRAINED_BEFORE


def test_a_network_with_several_outputs_is_refused_before_any_work(tmp_path, capsys):
    """By check and by a run, with the same sentence."""
    from dist_prune.cli.main import main as cli

    words = ["backbone.name=resnet18", "backbone.kwargs={features_only: true}"]
    said = []
    for act in (
        lambda: cli(["check", "quickstart", *words]),
        lambda: main(["--recipe", "quickstart", "--run-dir", str(tmp_path / "run"), *words]),
    ):
        assert act() == 2
        said.append(capsys.readouterr().err)
    assert all("backbone." in text and "Traceback" not in text for text in said)
    assert not (tmp_path / "run/dense.safetensors").exists()
