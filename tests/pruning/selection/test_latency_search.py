"""The search for a time on machines whose times are written down: the table may be wrong, whole networks count."""

import random
from dataclasses import replace

import pytest
import torch

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.known_costs import LatencyTable
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import macs
from dist_prune.pruning.selection.latency_search import ATTEMPTS, SPREAD, LatencySearch, isotonic
from dist_prune.pruning.selection.ranking import SelectionRequest, check_target, select_by_score
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

CHANNELS = trace_groups(tiny.network(name="resnet20_cifar"), tiny.example()[:1])
WHOLE = macs(CHANNELS)
SCORES = {g.name: torch.rand(g.width, generator=torch.Generator().manual_seed(1)) for g in CHANNELS.free}


class Clock:
    """A machine on which a network takes ``fixed`` of the dense time, and the rest by its multiplications."""

    def __init__(self, fixed: float, reliable=lambda turn: True, noise: float = 0.0, step: int = 1):
        self.fixed, self.reliable, self.step, self.seen = fixed, reliable, step, []
        self.noise, self.rng = noise, random.Random(3)

    def share(self, counts) -> float:
        return self.fixed + (1 - self.fixed) * macs(CHANNELS, counts) / WHOLE

    def measure(self, plans):
        self.seen.append(len(plans))
        turn = len(self.seen)
        return {
            name: (self.share(plan.counts) * (1 + self.rng.uniform(-self.noise, self.noise)), self.reliable(turn))
            for name, plan in plans.items()
        }

    def search(self, asked: float, saved: float = 0.0, tolerance: float | None = 0.05, **select) -> LatencySearch:
        """``saved``: what the table says that cutting any one group to a single channel saves, of noise alone."""
        request = SelectionRequest(target=("latency", asked), **select)
        times = {}
        for g in CHANNELS.free:
            alone = 1 - self.share({g.name: 1})
            times[g.name] = ((1, 1 - alone - saved), (g.width, 1.0))
        floors = {g.name: list(range(request.width(g, 1))) for g in CHANNELS.free}

        def choose(channels) -> Plan:
            check_target(channels, request)
            return Plan.from_kept(channels, select_by_score(channels, SCORES, request))

        table, self.said = LatencyTable(times), []
        return LatencySearch(
            CHANNELS, table, asked, tolerance, Plan.from_kept(CHANNELS, floors), choose, self.measure, self.said.append
        )


@pytest.mark.parametrize("saved", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("asked", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_table_of_noise_does_not_lead_astray(saved, asked, scope):
    """Each group seems to save ``saved`` for nothing: a sum of them promises any time at all for hardly a cut."""
    clock = Clock(0.4)
    search = clock.search(asked, saved, scope=scope)
    found = search.run()
    assert found.reliable
    assert found.measured == pytest.approx(asked, rel=0.05)
    assert found.measured == clock.share(found.plan.counts), "of the network that is taken"
    assert len(clock.seen) <= 1 + ATTEMPTS
    assert clock.seen[0] == 1 + len(SPREAD), "several whole networks, together"


def test_the_failure_of_a_correction_by_one_factor():
    """Predicted at half of the time, measured at most of it: the search goes on to smaller networks."""
    clock = Clock(0.4)
    search = clock.search(0.5, saved=0.2)
    naive = replace(CHANNELS, latency=search.table)
    first = search.choose(naive)
    assert clock.share(first.counts) > 0.8, "what the table alone would have taken"
    assert search.run().measured == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_noisy_but_reliable_times(seed):
    clock = Clock(0.3, noise=0.02)
    clock.rng = random.Random(seed)
    found = clock.search(0.6, 0.05).run()
    assert found.measured == pytest.approx(0.6, rel=0.05)
    assert clock.share(found.plan.counts) == pytest.approx(0.6, rel=0.075)


def test_what_cannot_be_reached_says_what_can():
    clock = Clock(0.6)
    with pytest.raises(
        PruneError, match=r"target\.latency: 0\.5 cannot be reached on this device.*reachable range is 0\.6"
    ) as e:
        clock.search(0.5, 0.2).run()
    assert "target.latency_batch" in str(e.value)
    assert len(clock.seen) == 1, "one measurement tells"


def test_without_a_tolerance_the_fastest_is_taken():
    found = Clock(0.6).search(0.5, tolerance=None).run()
    assert 0.6 < found.measured < 0.62


def test_an_unreliable_floor_refuses_nothing_and_is_measured_again():
    clock = Clock(0.3, reliable=lambda turn: turn > 2)
    found = clock.search(0.6).run()
    assert found.reliable and found.measured == pytest.approx(0.6, rel=0.05)
    never = Clock(0.3, reliable=lambda turn: False)
    found = never.search(0.6).run()
    assert not found.reliable, "nobody may call that target met"
    assert len(never.seen) == 1 + ATTEMPTS, "bounded"


def test_what_a_method_refuses_is_the_user_s_to_know():
    search = Clock(0.3).search(0.6)

    def refuse(channels):
        raise PruneError("this method has no threshold")

    search.choose = refuse
    with pytest.raises(PruneError, match="this method has no threshold"):
        search.run()


@pytest.mark.parametrize(("asked", "tolerance"), [(0.6, 0.05), (0.35, None), (0.31, None), (0.3, None)])
def test_what_is_taken_was_chosen_by_the_method(asked, tolerance):
    """The smallest network there can be is measured with any channels at all: it tells what is in reach."""
    search = Clock(0.3).search(asked, tolerance=tolerance)
    found = search.run()
    assert found.plan is not search.smallest
    for group in CHANNELS.free:
        kept, scores = found.plan.kept(group.name), SCORES[group.name]
        assert min(scores[kept]) >= max(scores[sorted(found.plan.removed.get(group.name, ()))], default=0)


def test_coarse_steps_end_the_search():
    """Between two neighbours of a coarse grid lies nothing: the largest one within the time is taken, and it stops."""
    clock = Clock(0.0)
    search = clock.search(0.5, tolerance=0.001, round_to=8)
    found = search.run()
    assert not search.within_tolerance(found)
    assert found.measured < 0.5
    assert all(one.measured > 0.5 or one.measured <= found.measured for one in search.tried.values())


def test_isotonic():
    assert isotonic([]) == []
    assert isotonic([1, 2, 3]) == [1, 2, 3]
    assert isotonic([3, 1, 2]) == [2, 2, 2]
    assert isotonic([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
