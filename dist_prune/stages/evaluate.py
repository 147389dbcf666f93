"""Stage ``evaluate``, after ``finetune``: accuracy, cost, file size and measured time of the three networks.

    dense.safetensors, round_N/pruned.safetensors, finetuned.safetensors, plan.json -> metrics.json, answers.safetensors

With ``repair.method`` the repaired network is a fourth one (round_N/repaired.safetensors). In rounds it also evaluates
the pruned, repaired and finetuned networks of every round.

answers.safetensors has what each network answers for each test image: ``labels``, ``<network>/predicted`` and
``<network>/confidence`` (in units of 2^-24), each (images,) int32, -1 for an image that could not be read; of a
segmentation ``<network>/confusion``. It is empty for tasks without answers.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.random_access import target_kind
from dist_prune.distributed.cpu_count import threads
from dist_prune.errors import PruneError
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import ANSWERS, DENSE, FINETUNED, METRICS, PRUNED, REPAIRED, round_path
from dist_prune.pruning.plan.block_masks import mask_violations, weight_masks
from dist_prune.pruning.selection.cost import COSTS, counted_costs
from dist_prune.pruning.selection.schedule import share_after_round
from dist_prune.pruning.selection.sparse_cost import sparse_sizes
from dist_prune.stages.measuring import Measure
from dist_prune.training.latency import measure_latency


def run(context: RunContext) -> StageOutput:
    """Evaluate the dense, the pruned and the finetuned network on the test images.

    Raises:
        PruneError: A network contradicts its plan: its number of parameters, or masked weights that are not zero.
    """
    recipe, networks = context.recipe, context.networks
    measure = Measure(context)
    if sentence := context.task.left_out(target_kind(context.images.loader(True).source)):
        context.tracker.info(f"  {sentence}")
        context.events.append({"stage": "evaluate", "event": sentence})
    graph, plan = networks.graph, networks.plan(context.round)
    files = {"pruned": round_path(context.round, PRUNED)}
    if recipe.repairs:
        files["repaired"] = round_path(context.round, REPAIRED)
    files["finetuned"] = FINETUNED
    models = {"dense": networks.load_dense()}
    models |= {name: networks.load_pruned(file, context.round) for name, file in files.items()}
    metrics: dict[str, Any] = {}
    answers: dict[str, Tensor] = {}
    for name, model in models.items():
        counts, kept = {} if name == "dense" else plan.counts, {}
        figures: dict[str, Any] = measure(model.to(context.environment.device), f"evaluate {name}", kept=kept)
        numbers = context.task.answer_names  # class numbers and confidences fit 32 bits, counts of pixels may not
        answers |= {f"{name}/{key}": table.int() if key in numbers else table for key, table in kept.items()}
        if figures["loss"] != figures["loss"]:
            context.tracker.info(f"  the {name} network's outputs are not finite on some images: its loss is none")
            context.events.append({"stage": "evaluate", "event": "not finite", "network": name})
            figures["loss"] = None
        metrics[name] = figures | {
            **{cost.name: cost.of(graph, counts) for cost in COSTS.values() if cost.figure},
            "size_bytes": context.path(files.get(name, DENSE)).stat().st_size,
        }
        _check_params(name, model, metrics[name]["params"])
        if plan.blocks:
            weights = model.state_dict()
            violations = mask_violations(weights, {} if name == "dense" else weight_masks(plan, graph, weights))
            if violations:
                raise PruneError(
                    f"the {name} network has masked weights that are not zero: {violations[:3]}; report this"
                )
            metrics[name]["sparse"] = sparse_sizes(graph, plan, weights, dense=name == "dense")
    for name, measured in _times(context, models).items():
        metrics[name]["latency"] = measured
    if context.task.answer_names:
        labels = context.images.loader(False).source.labels
        answers["labels"] = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int32))
    if recipe.schedule.rounds > 1:
        metrics["rounds"] = rounds(context, metrics, measure)
    return StageOutput({}, {ANSWERS: (answers, {})}, {METRICS: json.dumps(metrics, indent=1)})


def _times(context: RunContext, models: Mapping[str, nn.Module]) -> dict[str, dict[str, dict[str, Any]]]:
    """Network -> batch -> measured time, by the first rank; unreliable times are logged and become an event."""
    report, shape = context.recipe.report, tuple(context.images.example_input.shape[1:])
    device, comm = context.environment.device, context.environment.comm
    times = comm.run_on_main(
        lambda: measure_latency(
            models,
            shape,
            report.latency_batches,
            report.latency_repeats,
            device,
            report.threads or threads(),
            tracker=context.tracker,
        )
    )
    latencies = comm.broadcast_object(times) or {}
    for batch in map(str, report.latency_batches):
        doubts = {name: batches[batch]["why"] for name, batches in latencies.items() if not batches[batch]["reliable"]}
        if doubts:
            message = f"at batch {batch} after {latencies['dense'][batch]['rounds']} rounds: " + "; ".join(
                f"{name}: {reason}" for name, reason in doubts.items()
            )
            context.tracker.info(f"  measured times are not reliable {message}. Other work used the machine")
            context.events.append({"stage": "evaluate", "event": "times not reliable", "why": message})
    return latencies


def rounds(context: RunContext, last: Mapping[str, Any], measure: Measure) -> list[dict[str, Any]]:
    """The figures of each round.

    Args:
        context: The run.
        last: ``pruned``, ``repaired`` if there is a repair, and ``finetuned`` -> figures of the last round's
            networks, which are not measured again.
        measure: Measures the others.

    Returns:
        A dict per round: ``round``, ``target`` and the remaining costs as shares of the dense network, the task's
        figures after pruning and after finetuning, ``epochs`` of finetuning.
    """
    recipe, lines = context.recipe, []
    graph = context.selection_graph()
    kinds = {"pruned": PRUNED, "repaired": REPAIRED, "finetuned": FINETUNED}
    kinds = {name: file for name, file in kinds.items() if name in last}
    for number in range(1, context.round + 1):
        plan, figures = context.networks.plan(number), {}
        for name, file in kinds.items():
            figures_of_network = last[name]
            if number < context.round:
                model = context.networks.load_pruned(round_path(number, file), number).to(context.environment.device)
                figures_of_network = measure(model, f"evaluate {name}, round {number}")
            figures |= {
                f"{name}_{key}": figures_of_network[key] for key in context.task.titles if key in figures_of_network
            }
        target_key, schedule = recipe.target.asked(), recipe.schedule
        target = share_after_round(target_key[1], number, schedule.rounds, schedule.spacing) if target_key else None
        shares = {cost.name: cost.share(graph, plan.counts) for cost in counted_costs()}
        epochs = schedule.finetune_epochs if number < context.round else recipe.finetune.epochs
        lines.append({"round": number, "target": target, **shares, **figures, "epochs": epochs})
    return lines


def _check_params(name: str, model: nn.Module, params: int) -> None:
    counted = sum(parameter.numel() for parameter in model.parameters())
    if counted != params:
        raise PruneError(f"the {name} network has {counted} parameters, arithmetic says {params}: please report this")
