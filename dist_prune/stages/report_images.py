"""Images of the report page: what each network finds in some test images, and those that the pruning got wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.stage_graph import FINETUNED, PRUNED, REPAIRED, round_path
from dist_prune.report import answers, figures
from dist_prune.tasks.base import Task, in_float
from dist_prune.tasks.tallies import LOSS_UNIT

PICTURED = 3  # images of the page that shows what the networks find
SIDE = 192  # pixels of the longest side of a small image


def predictions(context: RunContext) -> list[list[tuple[str, str]]]:
    """What each network finds in the same evaluation images: a row of (caption, PNG) for each image.

    On the first rank, for tasks that have pictures; nothing elsewhere.
    """
    if type(context.task).pictures is Task.pictures:
        return []

    def make() -> list[list[tuple[str, str]]]:
        loader, device = context.images.loader(False), context.environment.device
        ids = np.unique(np.linspace(0, len(loader) - 1, PICTURED).round().astype(np.int64))
        batch = next(loader.batches([ids]))
        seen = pixels(context, batch.images)
        networks = context.networks
        repaired = {"repaired": round_path(context.round, REPAIRED)}
        repaired = repaired if context.recipe.repairs else {}
        files = {"pruned": round_path(context.round, PRUNED), **repaired, "finetuned": FINETUNED}
        models = {"dense": networks.load_dense()}
        models |= {name: networks.load_pruned(file, context.round) for name, file in files.items()}
        with torch.no_grad():
            outputs = {name: in_float(context.task.forward(m.to(device).eval(), batch)) for name, m in models.items()}
        rows = context.task.pictures(batch, seen, outputs)
        return [[(picture.caption, figures.png(picture.pixels)) for picture in row] for row in rows]

    return context.environment.comm.run_on_main(make) or []


def examples(
    context: RunContext, lines: Sequence[Mapping[str, Any]], found: Mapping[str, np.ndarray]
) -> dict[int, list[tuple[str, str]]]:
    """For each class that lost most, images that the pruning cost it: (caption, PNG in base64), made on the first rank.

    Args:
        context: The run.
        lines: ``classes`` of report.json.
        found: What the networks answered (answers.safetensors).

    Returns:
        Number of a class -> the predicted class with its confidence, and the image; empty without answers.
    """
    if "labels" not in found or "finetuned/predicted" not in found:
        return {}

    def make() -> dict[int, list[tuple[str, str]]]:
        loader, classes = context.images.loader(False), context.images.classes
        chosen = {line["number"]: answers.examples(line["number"], found) for line in answers.losers(lines)}
        ids = np.array(sorted({position for positions in chosen.values() for position in positions}), dtype=np.int64)
        if not len(ids):
            return {}
        batch = next(loader.batches([ids]))
        seen = dict(zip(batch.ids.tolist(), pixels(context, batch.images), strict=True))

        def caption(position: int) -> str:
            taken, sure = (int(found[f"finetuned/{key}"][position]) for key in ("predicted", "confidence"))
            return f"{classes[taken]}, {100 * sure / LOSS_UNIT:.0f} %"

        return {
            number: [(caption(one), figures.png(seen[one], SIDE)) for one in positions if one in seen]
            for number, positions in chosen.items()
        }

    return context.environment.comm.run_on_main(make) or {}


def pixels(context: RunContext, images: torch.Tensor) -> np.ndarray:
    """Test images of a batch as they are seen: (n, C, H, W) normalised -> (n, H, W, 3) uint8."""
    transform = context.images.loader(False).transform
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    seen = ((images.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return (seen[..., :3] if seen.shape[3] >= 3 else seen[..., :1].expand(-1, -1, -1, 3)).numpy()
