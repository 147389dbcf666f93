"""Plans from the files of the papers' programs: a run's file there and back, and what is refused."""

import json
import re
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
