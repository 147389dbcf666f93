"""Dense, pruned and finetuned, side by side: accuracy, cost, file size, measured time."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_prune.distributed.cpu_count import threads
from dist_prune.errors import PruneError
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import DENSE, FINETUNED, PRUNED, round_path
from dist_prune.pruning.plan.block_masks import mask_violations, weight_masks
from dist_prune.pruning.selection.cost import COSTS, counted_costs
from dist_prune.pruning.selection.schedule import share_after_round
from dist_prune.pruning.selection.sparse_cost import sparse_sizes
from dist_prune.training.evaluation import evaluate
from dist_prune.training.latency import measure_latency


def run(context: RunContext) -> StageOutput:
    """dense, pruned and finetuned weights -> metrics.json"""
    recipe, networks, test = context.recipe, context.networks, context.images.loader(False)
    graph, plan = networks.graph, networks.plan(context.round)
    files = {"pruned": round_path(context.round, PRUNED), "finetuned": FINETUNED}
    models = {"dense": networks.load_dense()}
    models |= {name: networks.load_pruned(file, context.round) for name, file in files.items()}
    out: dict[str, Any] = {}
    for name, model in models.items():
        counts = {} if name == "dense" else plan.counts
        figures: dict[str, Any] = evaluate(
            model.to(context.environment.device), test, recipe.evaluate.batch, context.environment.comm,
            context.tracker, f"evaluate {name}",
        )  # fmt: skip
        if figures["loss"] != figures["loss"]:
            context.tracker.info(f"  the {name} network's outputs are not finite on some images: its loss is none")
            context.events.append({"stage": "evaluate", "event": "not finite", "network": name})
            figures["loss"] = None
        out[name] = figures | {
            **{cost.name: cost.of(graph, counts) for cost in COSTS.values() if cost.figure},
            "size_bytes": context.path(files.get(name, DENSE)).stat().st_size,
        }  # fmt: skip
        _proved(name, model, out[name]["params"])
        if plan.blocks:
            weights = model.state_dict()
            broken = mask_violations(weights, {} if name == "dense" else weight_masks(plan, graph, weights))
            if broken:
                raise PruneError(f"the {name} network has masked weights that are not zero: {broken[:3]}; report this")
            out[name]["sparse"] = sparse_sizes(graph, plan, weights, dense=name == "dense")
    for name, measured in _times(context, models).items():
        out[name]["latency"] = measured
    if recipe.schedule.rounds > 1:
        out["rounds"] = rounds(context, out)
    return StageOutput({}, texts={"metrics.json": json.dumps(out, indent=1)})


def _times(context: RunContext, models: Mapping[str, nn.Module]) -> dict[str, dict[str, dict[str, Any]]]:
    """Network -> batch -> measured time, by the first rank; what is not reliable is said and becomes an event."""
    spec, shape = context.recipe.report, tuple(context.images.example_input.shape[1:])
    device, comm = context.environment.device, context.environment.comm
    times = comm.run_on_main(
        lambda: measure_latency(
            models, shape, spec.latency_batches, spec.latency_repeats, device, spec.threads or threads()
        )
    )
    found = comm.broadcast_object(times) or {}
    for batch in map(str, spec.latency_batches):
        why = {name: of[batch]["why"] for name, of in found.items() if not of[batch]["reliable"]}
        if why:
            said = f"at batch {batch} after {found['dense'][batch]['rounds']} rounds: " + "; ".join(
                f"{name}: {reason}" for name, reason in why.items()
            )
            context.tracker.info(f"  measured times are not reliable {said}. Other work had the machine")
            context.events.append({"stage": "evaluate", "event": "times not reliable", "why": said})
    return found


def rounds(context: RunContext, last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a round: what it was asked for and what is left (shares of the dense network), accuracy after cutting and
    after its finetuning. ``last``: the figures of the last round's networks."""
    recipe, out = context.recipe, []
    graph = context.selection_graph()
    for number in range(1, context.round + 1):
        plan, figures = context.networks.plan(number), {}
        for name, file in (("pruned", PRUNED), ("finetuned", FINETUNED)):
            found = last[name]
            if number < context.round:
                model = context.networks.load_pruned(round_path(number, file), number).to(context.environment.device)
                found = evaluate(
                    model, context.images.loader(False), recipe.evaluate.batch, context.environment.comm,
                    context.tracker, f"evaluate {name}, round {number}",
                )  # fmt: skip
            figures |= {f"{name}_{key}": found[key] for key in ("top1", "top5")}
        asked, spec = recipe.target.asked(), recipe.schedule
        target = share_after_round(asked[1], number, spec.rounds, spec.spacing) if asked else None
        shares = {cost.name: cost.share(graph, plan.counts) for cost in counted_costs()}
        epochs = spec.finetune_epochs if number < context.round else recipe.finetune.epochs
        out.append({"round": number, "target": target, **shares, **figures, "epochs": epochs})
    return out


def _proved(name: str, model: nn.Module, params: int) -> None:
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != params:
        raise PruneError(f"the {name} network has {found} parameters, arithmetic says {params}: please report this")
