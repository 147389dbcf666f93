"""Caps, overrides, globs, rounding and targets: every constraint holds for random requests."""

import math
import random
from dataclasses import replace

import pytest
import torch

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.known_costs import LatencyTable
from dist_prune.pruning.selection.cost import STEP, macs
from dist_prune.pruning.selection.ranking import (  # fmt: skip
    AUTO_WIDTH,
    SelectionRequest,
    check_target,
    cost_share,
    counts_of,
    reachable,
    refill_to_floor,
    select_by_score,
)
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.network_times import measured_widths, monotone
from tests.support import tiny

CHANNELS = trace_groups(tiny.network(name="resnet20_cifar"), tiny.example()[:1])
WIDE = trace_groups(tiny.network(), tiny.example()[:1])
TIMES = {  # times that fall with the square root of the width, at a few measured widths
    g.name: tuple((w, 1 - 0.05 * (1 - (w / g.width) ** 0.5)) for w in (1, g.width // 2, g.width)) for g in WIDE.free
}


def scores_of(channels, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.width, generator=generator) for group in channels.free}


def some_request(rng: random.Random, names: list[str]) -> SelectionRequest:
    most = rng.choice([None, 0.3, 0.5, 0.9, {"*conv1": 0.4}, {names[0]: 0.0, "layer3*": 0.7}])
    return SelectionRequest(
        scope=rng.choice(["local", "global"]),
        min_channels=rng.choice([1, 3, 20]),
        round_to=rng.choice([0, 1, 4, 8]),
        max_ratio=most,
        keep_ratios=rng.choice([{}, {}, {rng.choice(names): rng.choice([0.25, 0.6, 1.0])}]),
        include=rng.choice([(), (), ("layer*",), (names[-1], "layer3.*")]),
        target=(rng.choice(["macs", "params", "channels", "latency"]), 0.5),
    )


@pytest.mark.parametrize("seed", range(80))
def test_constraints_hold(seed):
    rng = random.Random(seed)
    channels = rng.choice([CHANNELS, WIDE])
    request = some_request(rng, [group.name for group in channels.free])
    quantity = request.target[0]  # type: ignore[index]
    if quantity == "latency":
        channels = replace(WIDE, latency=LatencyTable(TIMES))
        request = replace(request, keep_ratios={}, include=("layer*",))
    dense, channels = channels, channels.restrict_to(request.include)
    low, _ = reachable(channels, request, quantity)
    high = cost_share(channels, quantity, {g.name: request.width(g, g.width) for g in channels.free})
    share = low + rng.random() * (high - low)
    request = replace(request, target=(quantity, share))
    scores = scores_of(channels, seed)
    kept = select_by_score(channels, scores, request)
    counts = counts_of(kept)
    left = cost_share(channels, quantity, counts)
    assert left <= share + 1e-12
    for group in channels.free:
        count, own, step = len(kept[group.name]), _own(request, group), _step(request, group)
        assert count % step == 0 or count == group.width
        if own is not None:
            least = max(round(group.width * own), _floor(request, group))
            assert count == min(math.ceil(least / step) * step, group.width)
        assert count >= _floor(request, group)
        best = sorted(range(group.width), key=lambda i, g=group: (-float(scores[g.name][i]), -i))[:count]
        assert kept[group.name] == sorted(best), "the best channels stay"
        if own is None and count < group.width:
            larger = {**counts, group.name: min(count + step, group.width)}
            if step > 1 and quantity != "latency":  # predicted times overlap, and need not fall with every channel
                assert cost_share(channels, quantity, larger) > share, "no whole step fits any more"
    untouched = {g.name for g in dense.free} - {g.name for g in channels.free}
    assert not untouched & set(kept)
    assert bool(request.include) or not untouched


def _own(request, group):
    from fnmatch import fnmatchcase

    return next(
        (v for glob, v in request.keep_ratios.items() if any(fnmatchcase(p, glob) for p in group.producers)), None
    )


def _step(request, group) -> int:
    """The default written out anew: 8 for operations and time from 64 channels on, else 1."""
    if request.round_to:
        return request.round_to if group.width > request.round_to else 1
    return 8 if request.target[0] in ("macs", "latency") and group.width >= 64 else 1


def _floor(request, group) -> int:
    from fnmatch import fnmatchcase

    most = request.max_ratio
    if isinstance(most, dict):
        most = next((v for glob, v in most.items() if any(fnmatchcase(p, glob) for p in group.producers)), None)
    cap = 0 if most is None else math.ceil(group.width * (1 - most) - 1e-9)
    return min(max(1, request.min_channels, cap), group.width)


def test_the_default_rounding():
    wide = next(group for group in CHANNELS.free if group.width == 64)
    narrow = next(group for group in CHANNELS.free if group.width == 32)
    auto = SelectionRequest(round_to=0)
    assert (STEP, AUTO_WIDTH) == (8, 64)
    for quantity, step in (("macs", 8), ("latency", 8), ("params", 1), ("channels", 1)):
        asked = replace(auto, target=(quantity, 0.5))
        assert (asked.width(wide, 33), asked.width(narrow, 17)) == (40 if step == 8 else 33, 17)
    assert (
        SelectionRequest(round_to=0, threshold=0.7).width(wide, 33)
        == SelectionRequest(round_to=0, keep_ratio=0.5).width(wide, 33)
        == 33
    )


def test_thresholds_respect_caps_and_overrides():
    """What graphs keep is corrected in both directions."""
    request = SelectionRequest(max_ratio=0.5, keep_ratios={"layer2.0.conv1": 0.25}, threshold=0.7)
    worth = scores_of(WIDE, 3)
    kept = refill_to_floor(
        WIDE, request, {group.name: [0, 1] for group in WIDE.free if group.name != "layer2.0.conv1"}, worth
    )
    assert all(len(kept[g.name]) == g.width // 2 for g in WIDE.free)
    loose = replace(request, max_ratio=None)
    assert len(refill_to_floor(WIDE, loose, {}, worth)["layer2.0.conv1"]) == 8
    best = worth["layer2.0.conv1"].argsort(descending=True)[:8]
    assert refill_to_floor(WIDE, loose, {}, worth)["layer2.0.conv1"] == sorted(best.tolist())


def test_globs_that_match_nothing_are_refused():
    method = tiny.method("l1")
    for key, value in (("include", ("nowhere*",)), ("keep_ratios", {"layr1*": 0.5}), ("max_ratio", {"conv9": 0.5})):
        with pytest.raises(PruneError, match=rf"select\.{key}: .* match no layer"):
            method.prepare(WIDE, (), SelectionRequest(target=("macs", 0.5), **{key: value}))
    assert (
        "select.include"
        in method.prepare(WIDE, (), SelectionRequest(target=("macs", 0.9), include=("layer3*",)))
        .group("conv1")
        .protected
    )


def test_a_cap_moves_the_reachable_range():
    with pytest.raises(PruneError, match=r"raise select\.max_ratio"):
        check_target(WIDE, SelectionRequest(max_ratio=0.1, target=("macs", 0.5)))


def test_time_is_predicted_from_groups_and_measured_networks():
    """A group alone is as it was measured; fewer channels never take longer; whole networks bend what is predicted."""
    whole = macs(WIDE)
    times = {
        g.name: tuple((w, macs(WIDE, {g.name: w}) / whole) for w in (1, g.width)) for g in WIDE.free
    }  # fmt: skip
    known = replace(WIDE, latency=LatencyTable(times))
    rng = random.Random(5)
    for group in WIDE.free:
        counts = {group.name: rng.randint(1, group.width)}
        assert cost_share(known, "latency", counts) == pytest.approx(macs(WIDE, counts) / whole)
    noisy = {name: ((1, 1 - 0.3 * rng.random()), (g, 1.0)) for name, ((_, _), (g, _)) in times.items()}
    strange = replace(WIDE, latency=LatencyTable(noisy))
    counts, before = {g.name: g.width for g in WIDE.free}, 1.0
    while any(count > 1 for count in counts.values()):
        name = rng.choice([name for name, count in counts.items() if count > 1])
        counts[name] -= 1
        after = cost_share(strange, "latency", counts)
        assert after < before
        before = after
    counts = {g.name: g.width // 2 for g in WIDE.free}
    share = cost_share(known, "latency", counts)
    bent = replace(known, latency=LatencyTable(times, corrections=((share - 0.1, 0.5), (share + 0.1, 0.9), (1.0, 1.0))))
    assert cost_share(bent, "latency", counts) == pytest.approx(0.7)


def test_measured_points():
    assert monotone([[8, 0.9], [16, 0.8], [32, 1.02], [64, 1.0]]) == [
        [8, pytest.approx(0.85)], [16, pytest.approx(0.85)], [32, 1.0], [64, 1.0],
    ], "noise is averaged: the smaller of two would be too fast in every group"  # fmt: skip
    group = next(group for group in WIDE.free if group.width == 64)
    assert measured_widths(group, SelectionRequest(round_to=0, target=("latency", 0.5))) == [8, 16, 32, 48]
    assert measured_widths(group, SelectionRequest(min_channels=40, target=("latency", 0.5))) == [40, 48]
