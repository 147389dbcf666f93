"""Departures of the released programs of Shapley pruning; each function bears the name of its quirk."""

from typing import Literal

from dist_prune.pruning.hooks.gating import Where


def raw_outputs() -> Where:
    """Zero filters and biases, but not batch norms: a removed channel still gives the constant beta - gamma mu / sigma.

    beta, gamma, mu and sigma are the shift, scale, running mean and running deviation of its batch norm.
    """
    return "output"


def training_images() -> Literal["train"]:
    """Measure accuracy on images on which the network was trained, or will be finetuned."""
    return "train"


def test_images() -> Literal["test"]:
    """Measure accuracy on the images on which the result is evaluated (the ImageNet programs)."""
    return "test"


def augmented_images() -> bool:
    """Measure accuracy on training augmentations (the CIFAR programs); here they follow the recipe's seed."""
    return True
