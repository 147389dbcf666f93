"""Departures of the released programs of Dirichlet pruning; each function bears the name of its quirk.

The quirk ``batch_statistics`` has no function: the switches train with batch norms in training mode, which is an
argument of ``ScoringContext.train_parameters``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from dist_prune.methods.dirichlet.posteriors import Dirichlet, dirichlet_kl
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.capture import capture_outputs

DROPPED = 0.5  # share of the values that quirk dropout sets to 0


def mixed_images(logits: Tensor, draws: int) -> Tensor:
    """Read logits image by image that are laid out draw by draw, so that those of different images are averaged.

    Args:
        logits: (draws B, K), draw by draw.
        draws: number of draws.

    Returns:
        (draws, B, K), with images mixed up.
    """
    return logits.view(-1, draws, logits.shape[-1]).transpose(0, 1)


def dropout(
    model: nn.Module, layers: Sequence[str], masks: Callable[[str, Tensor], Tensor]
) -> AbstractContextManager[None]:
    """Run ``model`` with half of the outputs of its batch norms dropped.

    The switch networks of LeNet do it; the network itself does not.

    Args:
        model: the network with its switches.
        layers: names of the batch norms.
        masks: (layer, its outputs) -> factors of their shape.
    """
    points = [HookPoint(name, "", 0, "norm", False) for name in layers]
    return capture_outputs(model, points, lambda point, maps: maps * masks(point.name, maps))


def kl_at_mean(posterior: Dirichlet) -> Tensor:
    """Take the divergence at the normalised mean instead of at phi, as LeNet's point variant does; ()."""
    return dirichlet_kl(posterior.mean(), posterior.alpha)


def reversed_ranking(mean: Tensor) -> Tensor:
    """Reverse the ranking (C,), as the wide residual network's program does: the largest switches are removed."""
    return -mean
