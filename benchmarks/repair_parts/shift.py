"""Why shifted means alone do not repair a network with batch norms: what each repair leaves of scale and error."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import dist_prune as dp
from benchmarks.repair_parts import subjects
from dist_prune.pruning.repair import paired_walk
from dist_prune.pruning.repair.repaired_layers import RepairedLayer, repaired_layers

IMAGES = 64  # that the per-layer figures are taken on


def study(folder: Path, case: str, share: float, criterion: str, count: int, judge: int) -> str:
    """Top-1 of repairs one after another, and for each third of the layers what is left of their outputs.

    Args:
        folder: of the results.
        case: as in ``--cases``, without the share.
        share: of the MACs.
        criterion: that chooses the channels.
        count: calibration images.
        judge: judging images, at most.
    """
    network = subjects.parse(case)[0]
    subject = subjects.subject(network, folder, judge)
    images = subject.first(count)
    scored = folder / "scores" / f"{network}_{criterion}_{count}.safetensors"
    scores, _ = subjects.scores(subject, scored, criterion, images)
    plan = dp.select(scores, subject.graph, target={"macs": share}, seed=subjects.SEED, **subjects.selection(case))
    small = dp.prune(subject.model, plan)

    def repaired(*methods: Any, start: nn.Module = small) -> nn.Module:
        for method in methods:
            start = dp.repair(subject.model, start, plan, [images], method=method)
        return start

    def summands_alone() -> nn.Module:
        with patch.object(paired_walk._Steps, "other_summand", lambda *_: None):
            return repaired("bias")

    found = {
        "none": small,
        "bias": repaired("bias"),
        "bias, shortcuts' errors left out": summands_alone(),
        "norms": repaired("norms"),
        "norms, then bias": repaired("norms", "bias"),
        "bias, then norms": repaired("bias", "norms"),
        "least_squares": repaired("least_squares"),
    }
    layers, _ = repaired_layers(small, subject.graph, plan)
    x = images[0][:IMAGES]
    lines = [
        f"{case} {share:g} {criterion}, {count} images; dense {subject.dense:.2f} %",
        "| repair | top-1 | scale in thirds of the layers | mean off, in standard deviations | error / variance |",
        "|---|---|---|---|---|",
    ]
    for name, model in found.items():
        cells = [" ".join(f"{value:.2f}" for value in column) for column in left_of(subject.model, model, layers, x)]
        lines.append(f"| {name} | {subject.top1(model):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def left_of(dense: nn.Module, small: nn.Module, layers: list[RepairedLayer], x: Tensor) -> list[list[float]]:
    """Three figures for each third of the layers, by the outputs of their norms (of the layers, if they have none).

    Returns:
        The standard deviation as a share of the dense one; the mean's distance from the dense one in dense standard
        deviations; the mean square error as a share of the dense variance. Medians over all channels of the third.
    """
    names = [layer.norm or layer.name for layer in layers]
    pairs = list(zip(outputs(dense, names, x), outputs(small, names, x), layers, strict=True))
    rows: list[Tensor] = []
    for wanted, own, layer in pairs:
        wanted = wanted if layer.kept is None else wanted[:, layer.kept]
        a, b = (part.transpose(0, 1).flatten(1).double() for part in (wanted, own))
        spread = a.std(1).clamp_min(1e-9)
        error = (a - b).square().mean(1) / spread.square()
        rows.append(torch.stack([b.std(1) / spread, (a.mean(1) - b.mean(1)).abs() / spread, error]))
    third = -(-len(rows) // 3)
    parts = [torch.cat(rows[start : start + third], 1).median(1).values for start in range(0, len(rows), third)]
    return torch.stack(parts, 1).tolist()


@torch.no_grad()
def outputs(model: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """The outputs of modules on images."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
            found[name] = output.clone()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    model(x)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]
