"""Modes for a while: evaluation mode of modules, and gradients whatever the caller has switched off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a ``with`` block in evaluation mode, and give every module its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def with_gradients() -> Iterator[None]:
    """Tracing and scoring may need gradients, also when called in ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
