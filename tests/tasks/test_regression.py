"""The example of docs/adding-a-task.md."""

import torch

from dist_prune import tasks
from dist_prune.data.loader import Batch


def test_regression_by_hand():
    task = tasks.build({"name": "regression"})
    batch = Batch(torch.zeros(2, 1, 4, 4), torch.tensor([[1.0], [3.0]]), torch.arange(2))
    outputs = torch.tensor([[2.0], [1.0]])
    assert task.loss(outputs, batch).tolist() == [1.0, 4.0]
    tables = {**task.tally(outputs, batch), **task.rows(outputs, batch)}
    figures = task.figures(tables, images=2)
    assert figures["loss"] == 2.5
    assert figures["mae"] == 1.5
    assert abs(figures["rmse"] - 2.5**0.5) < 1e-6
    assert abs(figures["r2"] - (1 - 5 / 2)) < 1e-6
