"""Plans from the files of the papers' programs: a run's file there and back, and what is refused."""

import json
import pickle
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_prune import methods
from dist_prune.cli import main as cli
from dist_prune.config import loading
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.run import run
from tests.support.launch import report

NETWORK = ["backbone.name=resnet8p_cifar", "select.threshold=", "target="]
SMALL = [
    *NETWORK, "train.epochs=1", "finetune.epochs=0", "score.images=40", "score.micro_batch=10",
    "report.latency_repeats=1", "report.latency_batches=[1]", "report.trackers=[]",
]  # fmt: skip
KEYS: dict[str, list[str]] = {
    "sensitivity": ["method.name=sensitivity", "target={macs: 0.6}"],
    "mint": ["method={name: mint, groups: 2, p: [0.4], cap: 0.7}"],
    "entropy": ["method={name: entropy, alpha: 2.0, batch: 20}", "select.keep_ratio=0.5"],
}


def _of(program: str) -> list[str]:
    return [*NETWORK, *KEYS[program]]


def _told(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("program", "file"), [("mint", "scores.npz"), ("entropy", "orders.pth")])
def test_a_run_s_scores_there_and_back(program, file, tmp_path, capsys):
    """The program's file leads to the run's own plan."""
    place = tmp_path / "run"
    recipe = loading.load("quickstart", [*SMALL, *KEYS[program]], methods.options_of)
    run(recipe, place, DistributedEnvironment.single_process())
    capsys.readouterr()
    theirs, out = tmp_path / file, tmp_path / "plan.json"
    assert cli.main(["import-plan", str(place), "--to", program, "--out", str(theirs)]) == 0
    capsys.readouterr()
    told = _told(
        capsys, ["import-plan", "quickstart", str(theirs), *_of(program), "--from", program, "--out", str(out)]
    )
    assert told["fingerprint"] == report(place)["plan"]["fingerprint"]
    assert json.loads(out.read_text())["fingerprint"] == told["fingerprint"]
    if program == "entropy":  # any run's plan as masks
        theirs = tmp_path / "channel_index.pth"
        assert cli.main(["import-plan", str(place), "--to", "sensitivity", "--out", str(theirs)]) == 0
        words = ["import-plan", "quickstart", str(theirs), *_of(program), "--from", "sensitivity", "--out", str(out)]
        assert cli.main(words) == 0
        assert json.loads(out.read_text())["fingerprint"] == told["fingerprint"]


@pytest.fixture(scope="module")
def masks() -> list[np.ndarray]:
    """Of the six groups of ResNet-8: stem, three inner layers, two projections; all but the first two filters stay."""
    return [(np.arange(width) > 1).astype(np.float64) for width in (16, 16, 32, 32, 64, 64)]


@pytest.fixture
def words(tmp_path) -> list[str]:
    return [*NETWORK, "method={name: l1}", "target={macs: 0.5}", "--out", str(tmp_path / "plan.json")]


def test_masks_of_the_sensitivity_pruner(masks, words, tmp_path, capsys):
    """One file a block, in the order of the blocks; the names here come from the recipe's network."""
    torch.save(masks[:2], tmp_path / "one.pth")
    torch.save([torch.from_numpy(mask) for mask in masks[2:]], tmp_path / "two.pth")
    files = [str(tmp_path / "one.pth"), str(tmp_path / "two.pth")]
    assert cli.main(["import-plan", "--from", "sensitivity", "quickstart", *files, *words]) == 0
    assert "replays it" in capsys.readouterr().out
    removed = json.loads((tmp_path / "plan.json").read_text())["removed"]
    assert len(removed) == 6
    assert all(gone == [0, 1] for gone in removed.values())


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, file: str):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda masks: masks[:5], "5 masks, and the network has 6 groups"),
        (lambda masks: [masks[0][:8], *masks[1:]], "mask 1 is for 8 filters, and 'conv1' has 16"),
        (lambda masks: [masks[0] * 0, *masks[1:]], "keeps no filter"),
        (lambda masks: [masks[0] * 7, *masks[1:]], "one vector of 0 and 1"),
        (lambda masks: [16, [96, 144], 32], "widths, not which filters stay"),
        (lambda masks: "masks", "holds no masks"),
    ],
)
def test_masks_that_do_not_fit_are_refused(make, said, masks, words, tmp_path, capsys):
    torch.save(make(masks), tmp_path / "a.pth")
    assert cli.main(["import-plan", "quickstart", str(tmp_path / "a.pth"), *words, "--from", "sensitivity"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_widths_are_told_as_counts_that_a_recipe_takes(words, tmp_path, capsys):
    file = tmp_path / "channel_dim.pth"
    given = ["import-plan", "quickstart", str(file), *words, "--from", "sensitivity"]
    torch.save([8, [9, 20], [21, 40, 41]], file)
    assert cli.main(given) == 2
    told = re.search(r"select\.counts='(\{.*\})'", capsys.readouterr().err)
    assert told is not None
    keys = [word for word in words if "=" in word and not word.startswith("target")]
    recipe = [*keys, f"select.counts={told[1]}", "target="]
    assert cli.main(["check", "quickstart", *recipe]) == 0
    counts = loading.load("quickstart", recipe, methods.options_of).select.counts
    assert list(counts.values()) == [8, 9, 20, 21, 40, 41]
    for widths, said in (
        ([8, 9, 20, 21, 40, 65], "65 is no width of 'layer3.0.downsample.0', which has 64"),
        ([8, 9], "the file has 2, and the network has 6 groups"),
    ):
        torch.save(widths, file)
        assert cli.main(given) == 2
        assert said in capsys.readouterr().err


def test_nothing_is_unpickled(words, tmp_path, capsys):
    """The authors' own I_parent files are pickled dicts: refused with the command that makes plain arrays of them."""
    np.save(tmp_path / "I_parent_20g.npy", np.array({"0": np.ones((2, 2)), "1": Code(str(tmp_path / "run"))}))
    torch.save([Code(str(tmp_path / "run"))], tmp_path / "channel_index.pth")
    mint = [*_of("mint"), "--out", str(tmp_path / "plan.json"), "--from", "mint"]
    assert cli.main(["import-plan", "quickstart", str(tmp_path / "I_parent_20g.npy"), *mint]) == 2
    error = capsys.readouterr().err
    assert "np.load('I_parent_20g.npy', allow_pickle=True)" in error
    words = [*words, "--from", "sensitivity"]
    assert cli.main(["import-plan", "quickstart", str(tmp_path / "channel_index.pth"), *words]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "body", "said"),
    [
        ("mint", {str(i): np.full((2, 2), "a") for i in range(9)}, "holds values that are no finite numbers"),
        ("mint", {"0": np.ones((2, 2))}, "1 tables of scores, and the recipe scores"),
        ("entropy", {"filter_delete_order_bin_conv1": [0, 0, *range(1, 15)]}, "no order of 16 filters"),
        ("entropy", {"filter_delete_order_bin_conv1": list(range(16))}, "no order of layer1.0.conv1"),
    ],
)
def test_scores_that_do_not_fit_are_refused(program, body, said, tmp_path, capsys):
    file = tmp_path / ("a.npz" if program == "mint" else "a.pth")
    np.savez(file, **body) if program == "mint" else torch.save(body, file)
    words = [*_of(program), "--from", program, "--out", str(tmp_path / "plan.json")]
    assert cli.main(["import-plan", "quickstart", str(file), *words]) == 2
    assert said in capsys.readouterr().err


def _convert(error: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command that a refusal gives, in the folder of the file."""
    command = shlex.split(error[error.index("python -c ") :])
    monkeypatch.chdir(place)
    exec(command[2], {"__name__": "converting"})


def test_masks_in_a_list_for_each_block(masks, words, tmp_path):
    torch.save([masks[:2], [torch.from_numpy(mask) for mask in masks[2:]]], tmp_path / "a.pth")
    assert cli.main(["import-plan", "quickstart", str(tmp_path / "a.pth"), *words, "--from", "sensitivity"]) == 0
    assert len(json.loads((tmp_path / "plan.json").read_text())["removed"]) == 6


def test_widths_in_one_array_are_told_as_counts(words, tmp_path, capsys):
    torch.save(torch.tensor([8, 9, 20, 21, 40, 41]), tmp_path / "a.pth")
    assert cli.main(["import-plan", "quickstart", str(tmp_path / "a.pth"), *words, "--from", "sensitivity"]) == 2
    assert "select.counts='{conv1: 8, " in capsys.readouterr().err


@pytest.mark.parametrize("form", ["torch", "pickle", "array"])
def test_refused_masks_are_converted_by_the_command_of_the_refusal(form, masks, words, tmp_path, capsys, monkeypatch):
    """Masks beside objects, which a state dict's command would lose; in a pickle, which torch.load does not read."""
    file = tmp_path / "channel_index.pth"
    ragged = np.empty(len(masks), dtype=object)
    ragged[:] = masks
    body: Any = {"masks": ragged} if form == "array" else [*masks, Code(str(tmp_path / "run"))]
    if form == "pickle":
        file.write_bytes(pickle.dumps(body))
    else:
        torch.save(body, file)
    given = ["import-plan", "quickstart", str(file), *words, "--from", "sensitivity"]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file} holds more than tensors")
    assert "backbone.checkpoint" not in error
    assert not (tmp_path / "run").exists()
    _convert(error, tmp_path, monkeypatch)
    plain = tmp_path / "channel_index.plain.pth"
    body = torch.load(plain, weights_only=True)
    torch.save(body["masks"] if form == "array" else body, plain)
    assert cli.main(["import-plan", "quickstart", str(plain), *words, "--from", "sensitivity"]) == 0
    assert len(json.loads((tmp_path / "plan.json").read_text())["removed"]) == 6


@pytest.mark.parametrize("form", [dict, list])
def test_refused_scores_of_mint_are_converted_by_the_command_of_the_refusal(form, tmp_path, capsys, monkeypatch):
    """A dict under texts or numbers, or an array of tables of several sizes."""
    tables = [np.ones((2, 2)), np.ones((2, 3))]
    body = np.empty(2, dtype=object)
    body[:] = tables
    np.save(tmp_path / "I_parent.npy", np.array(dict(enumerate(tables))) if form is dict else body)
    words = [*_of("mint"), "--out", str(tmp_path / "plan.json"), "--from", "mint"]
    assert cli.main(["import-plan", "quickstart", str(tmp_path / "I_parent.npy"), *words]) == 2
    _convert(capsys.readouterr().err, tmp_path, monkeypatch)
    with np.load(tmp_path / "I_parent.npz") as arrays:
        assert [arrays[key].shape for key in ("0", "1")] == [(2, 2), (2, 3)]


@pytest.mark.parametrize(("suffix", "said"), [("npy", "a file of numpy, not of torch"), ("txt", "no torch checkpoint")])
def test_files_of_other_kinds_are_not_said_to_run_code(suffix, said, words, tmp_path, capsys):
    file = tmp_path / f"masks.{suffix}"
    np.save(file, np.ones(16)) if suffix == "npy" else file.write_text("masks")
    assert cli.main(["import-plan", "quickstart", str(file), *words, "--from", "sensitivity"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "run code" not in error


ORDERS = {"conv1": 16, "layer1.0.conv1": 16, "layer2.0.conv1": 32, "layer2.0.downsample.0": 32, "layer3.0.conv1": 64,
          "layer3.0.downsample.0": 64}  # fmt: skip


def _numbered(sampling: str, first: int = 0) -> dict[str, list[int]]:
    """Orders of layers conv1, conv2, .. as the authors' programs number those of a VGG."""
    return {
        f"filter_delete_order_{sampling}_skipZero_conv{number}": [*range(first, width), *range(first)]
        for number, width in enumerate(ORDERS.values(), start=1)
    }


def test_orders_of_numbered_layers_are_matched_by_their_numbers(tmp_path, capsys):
    file, out = tmp_path / "orders.pth", tmp_path / "plan.json"
    words = ["import-plan", "quickstart", str(file), *_of("entropy"), "select.exclude=[conv1]", "--from", "entropy"]
    body = {key: order for key, order in _numbered("reyei_uns").items() if not key.endswith("conv1")}
    torch.save(dict(reversed(body.items())), file)
    assert cli.main([*words, "--out", str(out)]) == 0
    assert "filter_delete_order_reyei_uns_skipZero_conv2 -> layer1.0.conv1" in capsys.readouterr().out
    assert json.loads(out.read_text())["removed"]["layer1.0.conv1"] == list(range(8))
    torch.save(_numbered("reyei_uns"), file)  # one more than the network has
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "no order of layer1.0.conv1" in capsys.readouterr().err
    body["filter_delete_order_reyei_uns_skipZero_conv3"] = list(range(16))
    torch.save(body, file)
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "no order of layer1.0.conv1" in capsys.readouterr().err


def test_of_several_samplings_the_recipe_s_is_taken(tmp_path, capsys):
    file, out = tmp_path / "orders.pth", tmp_path / "plan.json"
    body = {}
    for sampling, first in (("reyei_uns", 0), ("reyei_uns_tot", 8)):
        for name, width in ORDERS.items():
            body[f"filter_delete_order_{sampling}_{name}"] = [*range(first, width), *range(first)]
    torch.save(body, file)
    words = ["import-plan", "quickstart", str(file), *NETWORK, "select.keep_ratio=0.5", "--from", "entropy"]
    words += ["--out", str(out)]
    assert cli.main([*words, "method={name: entropy, batch: 20}"]) == 2
    assert "name the program's sampling with method.sampling" in capsys.readouterr().err
    for sampling, gone in (("reyei_uns", range(8)), ("reyei_uns_tot", range(8, 16))):
        assert cli.main([*words, f"method={{name: entropy, batch: 20, sampling: {sampling}}}"]) == 0
        assert json.loads(out.read_text())["removed"]["conv1"] == list(gone)


def test_a_file_too_many_on_the_way_out_is_refused(tmp_path, capsys):
    words = ["import-plan", str(tmp_path), "select.keep_ratio=0.5", "--to", "entropy", "--out", str(tmp_path / "a.pth")]
    assert cli.main(words) == 2
    assert "takes a run directory alone, and 'select.keep_ratio=0.5' is more" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [[0, 0, 1], [1, 0], [], [0, np.nan], ["a", "b"]])
def test_labels_that_are_no_runs_of_neighbours_are_refused(labels, tmp_path, capsys):
    np.savez(tmp_path / "I_parent.npz", **{str(i): np.ones((2, 2)) for i in range(9)})
    np.savez(tmp_path / "Labels_1.npz", np.array(labels))
    files = [str(tmp_path / name) for name in ("I_parent.npz", "Labels_1.npz")]
    words = [*_of("mint"), "--from", "mint", "--out", str(tmp_path / "plan.json")]
    assert cli.main(["import-plan", "quickstart", *files, *words]) == 2
    assert "no equal runs of neighbouring channels" in capsys.readouterr().err
