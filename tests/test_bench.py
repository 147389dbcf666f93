"""The bench's verbs on real ranks."""

import torch

from dist_prune.pruning.statistic import State, Statistic
from dist_prune.runtime.collectives import Ranks
from tests import tiny


class PerSample(Statistic):
    """Gradient times activation, summed over space, per sample: what Fisher and Taylor criteria gather."""

    def states(self, site):
        return {"taylor": State("rows", (site.width,), torch.float64)}

    def update(self, site, tables, maps, ids, grads):
        tables["taylor"][ids] = (maps * grads).sum((2, 3))


def gradients(ranks: Ranks) -> dict[str, list]:
    bench = tiny.bench(tiny.network(), ranks)
    sites = [site for site in bench.sites if site.kind == "conv"]
    return {
        site: tables["taylor"].tolist() for site, tables in bench.observe(sites, PerSample(), backward=True).items()
    }


def test_gradients_per_sample_are_the_same_for_every_world(pool):
    one = gradients(Ranks())
    for world in (2, 3):
        for found in pool.run(world, gradients):
            assert found == one


def test_gradients_are_right():
    """Against autograd on one image alone: micro-batches do not mix samples."""
    model = tiny.network()
    bench = tiny.bench(model)
    found = gradients(Ranks())
    batch = next(bench.feed.batches([bench.ids[20:21]]))
    maps = {}
    hook = model.get_submodule("layer2.0.conv1").register_forward_hook(lambda m, i, y: maps.setdefault("y", y))
    loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
    hook.remove()
    (grad,) = torch.autograd.grad(loss, maps["y"])
    expected = (maps["y"] * grad).sum((0, 2, 3)).tolist()
    assert torch.allclose(torch.tensor(found["layer2.0.conv1"][20]), torch.tensor(expected), atol=1e-9)


def counts(ranks: Ranks) -> list[tuple[int, int]]:
    bench = tiny.bench(tiny.network(), ranks)
    return [bench.measure({}), bench.measure({"conv1": [0, 1, 2], "layer3.0.conv1": list(range(40))})]


def test_measure_counts_with_channels_off(pool):
    found = [result for world in (1, 2, 3) for result in pool.run(world, counts)]
    assert all(result == found[0] for result in found)
    model = tiny.network()
    bench = tiny.bench(model)
    from dist_prune.pruning.plan import Plan

    plan = Plan(
        {"conv1": (0, 1, 2), "layer3.0.conv1": tuple(range(40))}, {g.name: g.width for g in bench.channels.groups}
    )
    small = tiny.bench(tiny.cut(model, bench.channels, plan))
    assert small.measure({}) == found[0][1]
    assert found[0][0][1] == tiny.IMAGES


def jobs(ranks: Ranks) -> list:
    bench = tiny.bench(tiny.network(), ranks)
    return bench.share(list("abcdefg"), lambda job: (job.upper(), ord(job)))


def test_share_gives_the_same_table_everywhere(pool):
    expected = [(job.upper(), ord(job)) for job in "abcdefg"]
    for world in (1, 2, 3):
        assert pool.run(world, jobs) == [expected] * world


def test_draws_are_named():
    bench = tiny.bench(tiny.network(), seed=4)
    first = torch.rand(3, generator=bench.draw("layer", 1))
    assert torch.equal(first, torch.rand(3, generator=bench.draw("layer", 1)))
    assert not torch.equal(first, torch.rand(3, generator=bench.draw("layer", 2)))
