"""A latency target: what each group's channels cost on this device, measured once; then a search, then the proof."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from dist_prune.errors import PruneError
from dist_prune.ledger import canonical, digest, read_json, write_atomic
from dist_prune.pruning import surgeon
from dist_prune.pruning.channels import ChannelGroup, Channels, LatencyTable
from dist_prune.pruning.choose import Request
from dist_prune.pruning.cost import time_share
from dist_prune.pruning.plan import Plan
from dist_prune.runtime.latency import latency
from dist_prune.runtime.machine import cores
from dist_prune.stages.work import Work

TABLE = "latency.json"
SHARES = (0.75, 0.5, 0.25)  # widths that are measured, beside the dense one and the floor
ATTEMPTS = 4


def fitted(work: Work, channels: Channels, choose: Callable[[Channels], Plan]) -> tuple[Plan, dict[str, Any]]:
    """The largest network whose measured time is within the target; ``predicted`` and ``measured`` shares, and how.

    A plan is measured; where it is too slow, the table learns by how much, and another is chosen. What is measured is
    measured on the first rank, and depends on the machine and the moment: this target alone is not the same everywhere.
    """
    ranks, asked = work.machine.ranks, work.recipe.target.latency
    assert asked is not None
    model = work.dense().eval()
    times = ranks.from_first(ranks.together(lambda: _table(work, model, channels)))
    table = LatencyTable({name: tuple((int(w), float(s)) for w, s in points) for name, points in (times or {}).items()})
    best: tuple[float, Plan, float] | None = None
    for attempt in range(1, ATTEMPTS + 1):
        known = replace(channels, latency=table)
        try:
            plan = choose(known)
        except PruneError:
            if best is None:
                raise
            break  # by what was measured meanwhile, the target is out of reach
        predicted = time_share(known, plan.counts)
        found = ranks.from_first(ranks.together(lambda plan=plan: _time(work, model, channels, {"plan": plan.removed})))
        measured = (found or {})["plan"]
        work.tracker.say(f"  latency: attempt {attempt}: {predicted:.1%} predicted, {measured:.1%} measured")
        # the nearest one within the target, or the fastest of those that are not
        rank = (measured > asked, abs(measured - asked))
        if best is None or rank < (best[2] > asked, abs(best[2] - asked)):
            best = (predicted, plan, measured)
        if abs(measured / asked - 1) <= (work.recipe.target.tolerance or 0) or predicted >= 1:
            break
        table = replace(table, scale=table.scale * (1 - measured) / (1 - predicted))
        if table.scale <= 0:
            break
    predicted, plan, measured = best or (1.0, choose(channels), 1.0)
    spec = work.recipe
    return plan, {
        "predicted": predicted, "measured": measured, "batch": spec.target.latency_batch,
        "device": str(work.machine.device), "threads": _threads(work), "repeats": spec.report.latency_repeats,
    }  # fmt: skip


def _threads(work: Work) -> int:
    return work.recipe.report.threads or cores()


def _table(work: Work, model: nn.Module, channels: Channels) -> dict[str, list[list[float]]]:
    """Group -> [[kept, share of the dense time], ...], from the run directory where it was measured for the same."""
    request, file = work.request, work.folder / TABLE
    widths = {group.name: widths_of(group, request) for group in channels.free}
    spec = work.recipe
    key = digest(canonical({
        "backbone": [spec.backbone.name, spec.backbone.kwargs, list(channels.example)], "widths": widths,
        "batch": spec.target.latency_batch, "device": str(work.machine.device), "threads": _threads(work),
        "repeats": spec.report.latency_repeats,
    }))  # fmt: skip
    body = read_json(file)
    if body.get("key") == key and body.get("digest") == digest(canonical(body.get("times"))):
        return body["times"]
    times = {}
    for group in channels.free:
        cuts = {str(w): {group.name: tuple(range(w, group.width))} for w in widths[group.name]}
        found = _time(work, model, channels, cuts)
        times[group.name] = rising([[w, found[str(w)]] for w in widths[group.name]] + [[group.width, 1.0]])
    write_atomic(file, json.dumps({"key": key, "digest": digest(canonical(times)), "times": times}, indent=1))
    return times


def widths_of(group: ChannelGroup, request: Request) -> list[int]:
    """The widths to measure, ascending, below the dense one."""
    floor = request.width(group, 1)
    found = {floor, *(request.width(group, round(group.width * share)) for share in SHARES)}
    return sorted(width for width in found if width < group.width)


def rising(points: list[list[float]]) -> list[list[float]]:
    """The same without noise that would make fewer channels slower than more: each share at most the next one's."""
    out = [list(point) for point in points]
    for before, after in zip(out[-2::-1], out[:0:-1], strict=True):
        before[1] = min(before[1], after[1])
    return out


def _time(
    work: Work, model: nn.Module, channels: Channels, cuts: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, float]:
    """Share of the dense time of some cut networks; they take turns with the dense one."""
    models = {"": model}
    for name, removed in cuts.items():
        models[name] = copy.deepcopy(model)
        widths = {group.name: group.width for group in channels.groups}
        surgeon.operate(models[name], channels, Plan({g: tuple(gone) for g, gone in removed.items() if gone}, widths))
    spec, batch = work.recipe, work.recipe.target.latency_batch
    shape = tuple(work.example.shape[1:])
    found = latency(models, shape, (batch,), spec.report.latency_repeats, work.machine.device, _threads(work))
    dense = found[""][str(batch)]["ms"]
    return {name: found[name][str(batch)]["ms"] / dense for name in cuts}
