"""Heads and head positions as a user prunes them: two rounds on two ranks, a bundle, another run from it."""

import json
from pathlib import Path

import pytest

import dist_prune
from dist_prune.pruning.plan.plan import Plan
from tests.support.launch import SMALL, TORCHRUN, finish, report

VIT = "backbone.kwargs={img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 4}"
RUN = (
    *SMALL, "backbone.name=vit_tiny_patch16_224", VIT, "backbone.streams=true", "method.name=taylor",
    "schedule.rounds=2", "target.tolerance=0.1", "finetune.epochs=1", "report.latency_batches=[1]",
    "report.trackers=[]",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("units", "names"), [("whole", {"qkv"}), ("head_width", {"qk", "v"})])
def test_two_rounds_of_units(tmp_path: Path, units, names):
    share = "select.keep_ratios=" + json.dumps({f"*.attn.{name}": 0.5 for name in sorted(names)})
    folder, _ = finish(TORCHRUN, tmp_path / "run", *RUN, f"backbone.units={units}", share)
    body = report(folder)
    plans = [Plan.from_json((folder / f"round_{number}/plan.json").read_text()) for number in (1, 2)]
    gone = {name.rpartition(".")[2] for name in plans[1].removed if ".attn." in name}
    assert gone == names
    assert all(set(channels) <= set(plans[1].removed[name]) for name, channels in plans[0].removed.items())
    model = dist_prune.load(folder / "export")
    assert sum(p.numel() for p in model.parameters()) == body["finetuned"]["params"]
    assert json.loads((folder / "export/bundle.json").read_text())["plan"] is not None
    again, _ = finish(
        TORCHRUN, tmp_path / "again", *RUN, f"backbone.units={units}", f"backbone.bundle={folder / 'export'}",
        "train.epochs=0", "schedule.rounds=1",
    )  # fmt: skip
    small = dist_prune.load(again / "export")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
