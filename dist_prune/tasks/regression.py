"""Regression: numbers for each image; squared error, RMSE, mean absolute error and R²."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_prune.tasks.base import Batch, Task
from dist_prune.tasks.outputs import main_output, shape_text
from dist_prune.tasks.tallies import count_losses, mean_of_counted


class Regression(Task):
    """Each output of the network is one number. Targets are learned as they are, so scale them to about 1."""

    name = "regression"
    targets = "values"
    titles = {"rmse": "RMSE", "mae": "mean absolute error", "r2": "R²"}
    primary = "rmse"
    higher_is_better = False

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Squared error, mean over the outputs, (n,)."""
        return (main_output(outputs) - batch.labels).square().mean(1)

    def tally(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"loss": count_losses(self.loss(outputs, batch))}

    def tally_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"loss": (2,)}

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Predictions and targets of each image."""
        return {"found": main_output(outputs), "wanted": batch.labels}

    def row_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"found": (outputs,), "wanted": (outputs,)}

    def figures(self, tables: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """Over all images and outputs: ``rmse`` and ``mae`` in the targets' unit; ``r2``, the mean over the outputs."""
        wanted, errors = tables["wanted"], tables["found"] - tables["wanted"]
        spread = (wanted - wanted.mean(0)).square().sum(0)
        return {
            "rmse": float(errors.square().mean().sqrt()),
            "mae": float(errors.abs().mean()),
            "r2": float((1 - errors.square().sum(0) / spread).mean()),
            "loss": mean_of_counted(tables["loss"], images),
        }

    def distil(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Squared distance to the dense network's outputs, mean over the outputs, (n,)."""
        return (main_output(outputs) - main_output(teacher)).square().mean(1)

    def check_outputs(self, outputs: Any, count: int, images: Tensor) -> str:
        found = main_output(outputs)
        if isinstance(found, Tensor) and found.shape == (len(images), count):
            return ""
        return f"gives {shape_text(outputs)}, for two images; regression needs numbers (images, {count})"
