"""The study of which method prunes best: what it counts, which pieces it does, and its tables."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from benchmarks import which_method
from benchmarks.which_parts import tables
from benchmarks.which_parts.settings import SETTINGS, Setting, method_of
from benchmarks.which_parts.study import Study, five_largest
from benchmarks.which_parts.subject import counted, unfold_norms
from dist_prune import methods
from dist_prune.data.datasets import ArraySource
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.communicator import Communicator
from dist_prune.training.bn_recalibration import recalibrate_bn
from tests.test_docs import OWN, ROOT

RESULTS = ROOT / "benchmarks/results/which_method.json"
ABOUT = {"processor": "a", "cores": 2, "threads": 1, "python": "3", "torch": "2", "commit": "c"}


def test_every_method_has_a_row():
    assert {method_of(row) for row in SETTINGS} == set(OWN)
    for row, setting in SETTINGS.items():
        methods.options_of(method_of(row)).model_validate(dict(setting.options))


def test_costs_are_counted_in_forward_and_backward():
    """Frozen first layers have no backward pass; a copy of the network counts as well."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 5))
    first, last = 4 * 16 * 27, 64 * 5
    images = torch.randn(2, 3, 4, 4)
    with counted() as cost:
        with torch.no_grad():
            model(images)
        model[0].requires_grad_(False)
        model[1].requires_grad_(False)
        model(images).sum().backward()
    assert (cost.forward, cost.backward) == (2 * 2 * (first + last), 2 * last)
    with counted() as none:
        pass
    assert none.forward == none.backward == 0


def test_folded_norms_get_statistics_and_keep_their_function():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    ).eval()
    model[1].bias.data.normal_()
    pixels = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8).numpy()
    source = ArraySource(pixels, torch.arange(20).numpy() % 2, ("a", "b"))
    loader = ImageLoader(source, TransformConfig(8, (0.5,) * 3, (0.25,) * 3), torch.device("cpu"))
    images = next(loader.batches([torch.arange(20).numpy()])).images
    with torch.no_grad():
        before = model(images)
        unfold_norms(model, loader, torch.arange(20).numpy(), 7)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
        assert model[1].running_mean.abs().min() > 0
        recalibrate_bn(model, loader, torch.arange(20).numpy(), 20, Communicator())  # the same images: nothing moves
        torch.testing.assert_close(model(images), before, rtol=1e-2, atol=1e-2)


def test_few_rows_can_hold_all_gradients():
    table = torch.full((100, 2), 1.0)
    assert five_largest({"a:in:gate": table, "a:in:batches": torch.tensor(100)}) == pytest.approx(0.05)
    table[7] = 1000.0
    assert five_largest({"a:in:gate": table, "b:in:gate": table}) > 0.99
    assert five_largest({"conv:weight": table}) is None


def test_pieces_come_in_the_order_of_the_patterns():
    wanted = list(which_method.wanted(["resnet20:taylor:finetune", "resnet20:[lt]*:untrained"], [0, 1]))
    assert wanted[:2] == [("resnet20", "taylor", "finetune", 0), ("resnet20", "taylor", "finetune", 1)]
    assert ("resnet20", "l1", "untrained", 0) in wanted
    assert ("resnet20", "l1", "untrained", 1) not in wanted  # nothing of it is drawn
    assert ("resnet20", "taylor", "untrained", 1) in wanted
    assert len(wanted) == len(set(wanted))
    assert not list(which_method.wanted(["mobilenetv2*:*:finetune"], [0]))
    there = {row for _, row, _, _ in which_method.wanted(["mobilenetv2:*:untrained"], [0])}
    assert {row for row in SETTINGS if row not in there} == {"taylor, 5000 images", "dirichlet", "sensitivity"}


def example(method: str, part: str, seed: int, top1: float, **more: object) -> tables.Piece:
    judged = {"held_out": top1 + 1, "test": top1}
    piece = {"network": "resnet20", "method": method, "part": part, "seed": seed, "about": ABOUT}
    piece["piece"] = {"cpu_seconds": 36.0}
    if part.startswith("finetune"):
        piece |= {"images": 45000, "took": {"seconds": 70, "cpu_seconds": 60}, "finetuned": judged}
    elif part.startswith("repaired"):
        piece |= {"images": 500, "took": {"seconds": 7, "cpu_seconds": 6}, "repaired": judged}
        piece["left"] = {"macs": 0.5, "params": 0.4}
    else:
        cost = {"images": 500, "forward": 500.0, "backward": 450.0, "cpu_seconds": 3.0}
        piece |= {"cost": cost, "left": {"macs": 0.5, "params": 0.4}}
        piece["five"] = 0.92 if method == "taylor" else None
        piece |= {"surgery": {"held_out": 11.0, "test": 10.0}, "recalibrated": judged}
    return piece | more


def test_the_compact_file_has_all_that_the_tables_tell(tmp_path):
    dense = {"network": "resnet20", "method": "dense", "part": "dense", "seed": 0, "held_out": 99.0, "test": 91.73}
    pieces = [
        dense | {"about": ABOUT, "piece": {"cpu_seconds": 1.0}},
        *(example("taylor", "untrained", seed, 50.0 + seed) for seed in (0, 1, 2)),
        example("l1", "untrained", 0, 60.0),
        example("l1", "finetune", 0, 80.0, epochs=1),
        example("l1", "finetune_global", 0, 82.0, epochs=1),
    ]
    for number, piece in enumerate(pieces):
        (tmp_path / f"{number}.seed0.json").write_text(json.dumps(piece))
    file = tmp_path / "compact.json"
    file.write_text(tables.compact(tables.read(tmp_path)))
    text = tables.markdown(tables.load(file))
    assert text == tables.markdown(pieces)
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| taylor |"))
    assert (
        "| gradients | 500 | 500 | 450 | 3 | 10.0 ± 0.0 | 51.0 ± 1.0 | 52.0 ± 1.0 | 0.40 | - | - | - | - | 3 / 0 |"
        in row
    )
    assert [line.split(" | ")[0] for line in lines if line.startswith(("| l1", "| taylor |"))][:2] == [
        "| l1",
        "| taylor",
    ]
    assert "| l1 | 81.0 | 80.0 | 1 |" in lines
    assert "Share of the squared gradients that the five largest rows have, seed 0: taylor 92 %." in lines
    assert "| l1; global | 83.0 | 82.0 | 1 |" in lines
    missing = [line for line in lines if line.startswith("Not measured: ")]
    assert len(missing) == 2 and all("`random`" in line for line in missing)
    assert "`taylor`" in missing[1] and "`taylor`" not in missing[0]


def test_repaired_networks_get_a_column_of_their_own(tmp_path):
    pieces = [
        example("taylor", "untrained", 0, 50.0),
        example("taylor", "repaired", 0, 77.5),
        example("taylor", "global", 0, 51.0),
    ]
    file = tmp_path / "compact.json"
    file.write_text(tables.compact(pieces))
    text = tables.markdown(tables.load(file))
    assert text == tables.markdown(pieces)
    head, row = (next(line for line in text.splitlines() if line.startswith(word)) for word in ("| method", "| taylor"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    heads = [cell.strip() for cell in head.strip("|").split("|")]
    assert len(cells) == len(heads)
    assert [cell for cell, name in zip(cells, heads, strict=True) if name == "repaired"] == ["77.5", "-"]


def test_a_file_keeps_the_pieces_of_other_folders():
    old = [example("l1", "finetune", 0, 80.0, epochs=1), example("l1", "untrained", 0, 50.0)]
    new = [example("l1", "finetune", 0, 85.0, epochs=5), example("l1", "untrained", 0, 51.0)]
    merged = tables.merge(old, new)
    assert [piece.get("epochs") for piece in merged] == [1, 5, None]
    assert merged[-1]["recalibrated"]["test"] == 51.0


def test_the_figures_of_the_page_are_complete_and_small():
    assert RESULTS.stat().st_size < 50_000
    pieces = tables.load(RESULTS)
    assert {piece["method"] for piece in pieces} >= {"random", "l1", "taylor", "dense"}
    for piece in pieces:
        judged = [piece[name] for name in ("surgery", "recalibrated", "finetuned") if name in piece] or [piece]
        assert all(0 <= found["test"] <= 100 and math.isfinite(found["test"]) for found in judged)


@pytest.mark.parametrize("words", [["--only", "resnet20"], ["--only", "resnet20:l1"]])
def test_a_pattern_has_three_parts(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["which_method.py", *words])
    with pytest.raises(SystemExit):
        which_method.main()
    assert "network:method:part" in capsys.readouterr().err


def test_pieces_of_real_images_are_measured_once(data, tmp_path, monkeypatch, capsys):
    words = ["which_method.py", "--out", str(tmp_path), "--limit", "40", "--epochs", "1", "--seeds", "0", "--only"]
    monkeypatch.setattr("sys.argv", [*words, "resnet20:taylor:untrained", "resnet20:taylor:repaired"])
    which_method.main()
    monkeypatch.setattr("sys.argv", [*sys.argv, "resnet20:taylor:finetune_global"])
    which_method.main()
    untrained, repaired, tuned = (
        json.loads(next(tmp_path.glob(f"*.{part}*.json")).read_text())
        for part in ("untrained", "repaired", "finetune_global")
    )
    assert repaired["images"] == 40 and repaired["left"] == untrained["left"]
    assert repaired["repaired"]["test"] > untrained["surgery"]["test"]
    assert untrained["cost"]["images"] == untrained["cost"]["forward"] == 40
    assert 0.8 < untrained["cost"]["backward"] / 40 < 1
    assert 0.05 < untrained["five"] <= 1
    assert 0.45 < untrained["left"]["macs"] <= 0.5
    assert tuned["epochs"] == 1 and tuned["images"] == 40
    assert {"processor", "threads", "commit"} <= tuned["about"].keys()
    assert capsys.readouterr().out.count("resnet20.taylor") == 3
    which_method.main()
    assert capsys.readouterr().out == ""


def test_scores_of_other_options_are_made_anew(data, tmp_path, monkeypatch):
    study = Study(tmp_path, 40, 1)
    for options, name in (({}, "gate"), ({"form": "weight"}, "weight")):
        monkeypatch.setitem(SETTINGS, "taylor", Setting("gradients", 40, 5, options=options))
        for _ in range(2):
            assert all(key.endswith((name, "batches")) for key in study.scores("resnet20", "taylor", 0)[1])
