"""Checking the same network again reads what its trial cuts found; another network, size or file does not."""

import json
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.cli import trial_cut_cache
from dist_prune.cli.trial_cut_cache import TrialCutCache
from dist_prune.pruning.graph.tracer import trace_dependencies
from dist_prune.pruning.surgery.verified_trace import trace_groups, verify_groups


@pytest.fixture
def verified(monkeypatch, tmp_path):
    """The number of verifications so far; the cache folder is new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    monkeypatch.setattr(trial_cut_cache, "verify_groups", lambda *given: made.append(1) or verify_groups(*given))
    return made


def check(name="resnet20_cifar", classes=10, in_chans=3, kwargs=None, side=32, model=None):
    model = model or models.create(name, classes, in_chans, False, kwargs or {}).eval()
    cache = TrialCutCache(name, classes, in_chans, kwargs or {})
    return trace_groups(model, torch.zeros(1, in_chans, side, side), verify=cache.verify)


def test_the_second_check_finds_the_same_without_a_trial_cut(verified):
    """XCiT has groups that cannot be cut, as only trial cuts show: reasons are kept as well."""
    name = "xcit_nano_12_p16_224"
    plain = trace_groups(models.create(name, 10, 3).eval(), torch.zeros(1, 3, 64, 64))
    found = [check(name, side=64) for _ in range(2)]
    assert len(verified) == 1
    assert [replace(graph, memory=None) for graph in found] == [replace(plain, memory=None)] * 2
    unverified = trace_dependencies(models.create(name, 10, 3).eval(), torch.zeros(1, 3, 64, 64))
    assert len(unverified.free) > len(plain.free) > 0


@pytest.mark.parametrize(
    "other",
    [{"classes": 7}, {"in_chans": 1}, {"side": 48}, {"kwargs": {"img_size": 32}}, {"name": "resnet20p_cifar"}],
    ids=str,
)
def test_another_network_is_verified(verified, other):
    check()
    check(**other)
    assert len(verified) == 2


def test_other_code_and_other_versions_are_verified(verified, monkeypatch):
    check()
    monkeypatch.setattr(trial_cut_cache, "_stamp", lambda file: (1, 2))
    check()
    monkeypatch.setattr(trial_cut_cache, "version", lambda library: "0")
    check()
    assert len(verified) == 3


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images):
        return self.two(self.one(images).relu()).mean((2, 3))


def test_a_user_s_network_is_always_verified(verified, tmp_path):
    for _ in range(2):
        check("own.py:Own", model=Own().eval())
    assert len(verified) == 2 and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "text", ["{", '{"kind": "other", "reasons": {}}', '{"kind": "trial-cuts-1", "reasons": {"no": "x"}}']
)
def test_a_damaged_file_is_made_anew(verified, tmp_path, text):
    check()
    (file,) = tmp_path.rglob("*.json")
    before = file.read_text()
    file.write_text(text)
    check()
    assert len(verified) == 2 and file.read_text() == before
    assert json.loads(before)["kind"] == "trial-cuts-1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_folder_that_cannot_be_written(verified, tmp_path):
    tmp_path.chmod(0o500)
    check()
    assert len(verified) == 1


def test_a_cache_folder_that_is_a_file(verified, monkeypatch, tmp_path):
    (tmp_path / "dist_prune").write_text("")
    check()
    assert len(verified) == 1
