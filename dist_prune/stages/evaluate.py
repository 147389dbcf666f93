"""Dense, pruned and finetuned, side by side: accuracy, cost, file size, measured time."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_prune.errors import PruneError
from dist_prune.pruning.cost import COSTS, countable
from dist_prune.pruning.masks import masks_of, violations
from dist_prune.pruning.rounds import share_at
from dist_prune.pruning.sizes import sparse_sizes
from dist_prune.runtime.cores import threads
from dist_prune.runtime.evaluation import evaluate
from dist_prune.runtime.latency import latency
from dist_prune.stages.order import at
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """dense, small and tuned weights -> metrics.json"""
    recipe, channels, kept, test = work.recipe, work.channels, work.plan.counts, work.feed(False)
    files = {"dense": "dense.safetensors", "pruned": work.here("small.safetensors"), "finetuned": "tuned.safetensors"}
    models = {name: work.dense() if name == "dense" else work.small(file) for name, file in files.items()}
    out: dict[str, Any] = {}
    for name, model in models.items():
        counts = {} if name == "dense" else kept
        figures: dict[str, Any] = evaluate(
            model.to(work.machine.device), test, recipe.evaluate.batch, work.machine.ranks, work.tracker,
            f"evaluate {name}",
        )  # fmt: skip
        if figures["loss"] != figures["loss"]:
            work.tracker.say(f"  the {name} network's outputs are not finite on some images: its loss is none")
            work.events.append({"stage": "evaluate", "event": "not finite", "network": name})
            figures["loss"] = None
        out[name] = figures | {
            **{cost.name: cost.of(channels, counts) for cost in COSTS.values() if cost.figure},
            "size_bytes": (work.folder / files[name]).stat().st_size,
        }  # fmt: skip
        _proved(name, model, out[name]["params"])
        if work.plan.blocks:
            weights = model.state_dict()
            broken = violations(weights, {} if name == "dense" else masks_of(work.plan, channels, weights))
            if broken:
                raise PruneError(f"the {name} network has masked weights that are not zero: {broken[:3]}; report this")
            out[name]["sparse"] = sparse_sizes(channels, work.plan, weights, dense=name == "dense")
    for name, measured in _times(work, models).items():
        out[name]["latency"] = measured
    if recipe.schedule.rounds > 1:
        out["rounds"] = rounds(work, out)
    return Made({}, texts={"metrics.json": json.dumps(out, indent=1)})


def _times(work: Work, models: Mapping[str, nn.Module]) -> dict[str, dict[str, dict[str, Any]]]:
    """Network -> batch -> measured time, by the first rank; what is not reliable is said and becomes an event."""
    spec, shape = work.recipe.report, tuple(work.example.shape[1:])
    times = work.machine.ranks.together(
        lambda: latency(
            models, shape, spec.latency_batches, spec.latency_repeats, work.machine.device, spec.threads or threads()
        )
    )
    found = work.machine.ranks.from_first(times) or {}
    for batch in map(str, spec.latency_batches):
        why = {name: of[batch]["why"] for name, of in found.items() if not of[batch]["reliable"]}
        if why:
            said = f"at batch {batch} after {found['dense'][batch]['rounds']} rounds: " + "; ".join(
                f"{name}: {reason}" for name, reason in why.items()
            )
            work.tracker.say(f"  measured times are not reliable {said}. Other work had the machine")
            work.events.append({"stage": "evaluate", "event": "times not reliable", "why": said})
    return found


def rounds(work: Work, last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a round: what it was asked for and what is left (shares of the dense network), accuracy after cutting and
    after its finetuning. ``last``: the figures of the last round's networks."""
    recipe, out = work.recipe, []
    channels = work.method.ready(work.channels, recipe.select.exclude, work.request)
    for number in range(1, work.round + 1):
        plan, figures = work.plan_of(number), {}
        for name, file in (("pruned", "small.safetensors"), ("finetuned", "tuned.safetensors")):
            found = last[name]
            if number < work.round:
                model = work.small(at(number, file), number).to(work.machine.device)
                found = evaluate(
                    model, work.feed(False), recipe.evaluate.batch, work.machine.ranks, work.tracker,
                    f"evaluate {name}, round {number}",
                )  # fmt: skip
            figures |= {f"{name}_{key}": found[key] for key in ("top1", "top5")}
        asked, spec = recipe.target.asked(), recipe.schedule
        target = share_at(asked[1], number, spec.rounds, spec.spacing) if asked else None
        shares = {cost.name: cost.share(channels, plan.counts) for cost in countable()}
        epochs = spec.finetune_epochs if number < work.round else recipe.finetune.epochs
        out.append({"round": number, "target": target, **shares, **figures, "epochs": epochs})
    return out


def _proved(name: str, model: nn.Module, params: int) -> None:
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != params:
        raise PruneError(f"the {name} network has {found} parameters, arithmetic says {params}: please report this")
