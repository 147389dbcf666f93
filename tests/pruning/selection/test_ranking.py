"""Ranking, budgets, floors and rounding: every constraint holds for random requests."""

import random
from dataclasses import replace

import pytest
import timm
import torch

from dist_prune.errors import PruneError
from dist_prune.pruning.selection import tie_breaking
from dist_prune.pruning.selection.ranking import (
    SelectionRequest,
    check_target,
    cost_share,
    counts_of,
    reachable,
    select_by_score,
)
from dist_prune.pruning.selection.removal_order import removal_order, structure
from dist_prune.pruning.selection.tie_breaking import orders_of
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

CHANNELS = trace_groups(tiny.network(), tiny.example()[:1])
SCORES = {
    group.name: torch.rand(group.width, generator=torch.Generator().manual_seed(i))
    for i, group in enumerate(CHANNELS.free)
}


@pytest.mark.parametrize("seed", range(40))
def test_constraints_hold(seed):
    rng = random.Random(seed)
    quantity = rng.choice(["macs", "params", "channels"])
    plain = SelectionRequest(
        scope=rng.choice(["local", "global", "isomorphic"]),
        min_channels=rng.choice([1, 3, 20]),
        round_to=rng.choice([1, 4, 8]),
    )
    low, high = reachable(CHANNELS, plain, quantity)
    share = low + rng.random() * (high - low)
    request = SelectionRequest(
        scope=plain.scope, min_channels=plain.min_channels, round_to=plain.round_to, target=(quantity, share)
    )
    kept = select_by_score(CHANNELS, SCORES, request)
    assert cost_share(CHANNELS, quantity, counts_of(kept)) <= share
    for group in CHANNELS.free:
        count = len(kept[group.name])
        assert min(plain.min_channels, group.width) <= count <= group.width
        assert count % plain.round_to == 0 or group.width <= plain.round_to
        worst = min(float(SCORES[group.name][i]) for i in kept[group.name])
        gone = set(range(group.width)) - set(kept[group.name])
        assert all(float(SCORES[group.name][i]) <= worst for i in gone), "the best channels stay"
    if plain.round_to == 1:
        assert share - cost_share(CHANNELS, quantity, counts_of(kept)) < 0.02, (
            "no further from the target than a channel"
        )


def test_keep_ratio_local_and_global():
    local = counts_of(select_by_score(CHANNELS, SCORES, SelectionRequest(keep_ratio=0.75)))
    assert all(local[group.name] == group.width * 3 // 4 for group in CHANNELS.free)
    everywhere = counts_of(select_by_score(CHANNELS, SCORES, SelectionRequest(keep_ratio=0.75, scope="global")))
    total = sum(group.width for group in CHANNELS.free)
    assert sum(everywhere.values()) == total - int(total / 4)
    assert everywhere != local


def test_ties_fall_to_the_smaller_index():
    steps = {group.name: (torch.arange(group.width) % 2).double() for group in CHANNELS.free}
    kept = select_by_score(CHANNELS, steps, SelectionRequest(keep_ratio=0.75))
    assert kept["conv1"] == sorted([*range(1, 16, 2), *range(8, 16, 2)])


def test_in_a_group_of_equals_the_seed_decides_and_not_the_position():
    even = {group.name: torch.zeros(group.width) for group in CHANNELS.free}
    kept = [select_by_score(CHANNELS, even, SelectionRequest(keep_ratio=0.5, seed=seed)) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0]["conv1"] not in (list(range(8)), list(range(8, 16)))
    smaller = select_by_score(CHANNELS, even, SelectionRequest(keep_ratio=0.25))
    assert set(smaller["conv1"]) < set(kept[0]["conv1"]), "plans of one seed are nested"
    assert orders_of(even, 0)["conv1"][8:] != orders_of(even, 1)["conv1"][8:]
    assert sorted(orders_of(even, 0)["conv1"][8:]) == kept[0]["conv1"], "one order for plans and curves"
    everywhere = counts_of(select_by_score(CHANNELS, even, SelectionRequest(keep_ratio=0.5, scope="global")))
    assert all(count == group.width // 2 for group in CHANNELS.free for count in [everywhere[group.name]])
    mixed = {**SCORES, "conv1": torch.full((16,), 0.5)}
    others = [select_by_score(CHANNELS, mixed, SelectionRequest(keep_ratio=0.5, seed=seed)) for seed in (3, 4)]
    assert [name for name in SCORES if others[0][name] != others[1][name]] == ["conv1"], "no other group hangs on it"
    assert tie_breaking.tie_warnings(SCORES) == []
    (text,) = tie_breaking.tie_warnings(mixed)
    assert f"in 1 of {len(SCORES)} groups all channels have the same score (conv1: 0.5)" in text


def test_scores_that_are_no_numbers_are_refused():
    broken = {**SCORES, "conv1": SCORES["conv1"].clone().index_fill(0, torch.tensor([3]), float("nan"))}
    with pytest.raises(PruneError, match="1 of the 16 scores of conv1 are not finite"):
        select_by_score(CHANNELS, broken, SelectionRequest(keep_ratio=0.5))


def test_an_impossible_target_names_the_reachable_range():
    with pytest.raises(
        PruneError, match=r"target\.macs: 0\.001 cannot be reached.*reachable range is 0\.\d+ to 1"
    ) as error:
        check_target(CHANNELS, SelectionRequest(min_channels=4, target=("macs", 0.001)))
    assert "select.min_channels" in str(error.value)


def test_nothing_asked_says_what_to_set():
    with pytest.raises(PruneError, match=r"set target\.macs"):
        select_by_score(CHANNELS, SCORES, SelectionRequest())


def test_excluded_groups_are_protected():
    guarded = CHANNELS.exclude(["layer2.*"])
    assert {g.name for g in CHANNELS.free} - {g.name for g in guarded.free} == {
        "layer2.0.conv1",
        "layer2.0.downsample.0",
    }
    assert "select.exclude 'layer2.*'" in guarded.group("layer2.0.conv1").protected


@pytest.mark.parametrize("normalise", [True, False])
def test_global_ranking_compares_each_group_s_scores_with_their_mean(normalise):
    """By hand: what goes first over groups of different widths and scales."""
    scales = [10.0**number for number in range(len(CHANNELS.free))]
    scores = {group.name: scale * SCORES[group.name] for group, scale in zip(CHANNELS.free, scales, strict=True)}
    found = removal_order(CHANNELS, scores, "global", normalise)
    by_hand = []
    for number, group in enumerate(CHANNELS.free):
        values = scores[group.name].double()
        mean = float(values.abs().mean()) if normalise else 1.0
        by_hand += [(float(value) / mean, number, rank) for rank, value in enumerate(values.sort().values)]
    assert [(number, rank) for _, number, rank in found] == [(number, rank) for _, number, rank in sorted(by_hand)]
    assert [first for first, _, _ in found] == pytest.approx([first for first, _, _ in sorted(by_hand)], rel=1e-6)


def test_groups_of_equal_structure_compete_and_others_do_not():
    """By hand: within each set the channels are ranked by score; sets lose equal shares."""
    sets = {}
    for number, group in enumerate(CHANNELS.free):
        sets.setdefault(structure(CHANNELS, group), []).append(number)
    assert 1 < len(sets) < len(CHANNELS.free), "some compete, not all"
    by_hand = []
    for numbers in sets.values():
        pairs = []
        for number in numbers:
            values = SCORES[CHANNELS.free[number].name].double()
            pairs += [(float(v) / float(values.mean()), number, r) for r, v in enumerate(values.sort().values)]
        by_hand += [((i + 1) / len(pairs), number, rank) for i, (_, number, rank) in enumerate(sorted(pairs))]
    order = removal_order(CHANNELS, SCORES, "isomorphic")
    assert [pair for _, *pair in order] == [pair for _, *pair in sorted(by_hand)]
    assert [share for share, _, _ in order] == pytest.approx([share for share, _, _ in sorted(by_hand)])
    kept = counts_of(select_by_score(CHANNELS, SCORES, SelectionRequest(keep_ratio=0.5, scope="isomorphic")))
    for numbers in sets.values():
        groups = [CHANNELS.free[number] for number in numbers]
        left = sum(kept[group.name] for group in groups)
        assert left == pytest.approx(sum(group.width for group in groups) / 2, abs=1)


def test_structure_is_that_of_the_layers_not_of_the_widths():
    """MLPs of all stages of a ConvNeXt compete with one another, and so do a ViT's; heads compete with heads."""
    wide = trace_groups(timm.create_model("convnext_atto", num_classes=10).eval(), torch.zeros(1, 3, 64, 64))
    mlps = [group for group in wide.free if ".mlp.fc1" in group.name]
    assert len(mlps) == 12 and len({structure(wide, group) for group in mlps}) == 1
    assert len({group.width for group in mlps}) == 4
    vit = trace_groups(
        timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, num_classes=10).eval(),
        torch.zeros(1, 3, 32, 32),
    )
    kinds = {structure(vit, group) for group in vit.free}
    assert len(vit.free) == 6 and len(kinds) == 2 and {group.unit for group in vit.free} == {"channel", "head"}


def test_whole_units_go_one_by_one():
    group = CHANNELS.free[-1]
    asked = SelectionRequest(target=("macs", 0.5), round_to=8)
    assert asked.multiple(group) == 8
    assert asked.multiple(replace(group, unit="head")) == 1
    assert SelectionRequest(target=("macs", 0.5), round_to=8).multiple(replace(group, width=8)) == 1, (
        "no wider than a step"
    )


@pytest.mark.parametrize("quantity", ["macs", "params", "channels"])
def test_the_ends_of_what_is_reachable_can_be_asked_for(quantity):
    low, high = reachable(CHANNELS, SelectionRequest(), quantity)
    assert 0 < low < high == 1
    for share in (low, high):
        check_target(CHANNELS, SelectionRequest(target=(quantity, share)))
    for share in (low - 1e-6, high + 1e-6):
        with pytest.raises(PruneError, match=f"target.{quantity}"):
            check_target(CHANNELS, SelectionRequest(target=(quantity, share)))
