"""Folding of batch norms into the convolutions before them, to serve a network that is no longer trained.

A batch norm in evaluation mode scales and shifts a channel, and the convolution's own weights can do the same. The
folded network reads and writes each feature map once less. A pruned network gains most, since its convolutions are
cheap.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dist_prune.errors import PruneError
from dist_prune.pruning.network_output import logits_of

FOLDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLOSE = 1e-3  # tolerance in units of the largest logit: float32 rounds differently after folding


class _Uses(TorchFunctionMode):
    """Counts how often each tensor is an argument of a function that makes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):  # not a question of shape or type
            self.of.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return out


@torch.no_grad()
def fuse_bn(model: nn.Module, images: Tensor) -> int:
    """Fold in place each batch norm whose only input is the output of a convolution that nothing else reads.

    Args:
        model: A deterministic network in evaluation mode.
        images: (N, C, H, W) inputs, to trace where tensors go and to compare the outputs before and after.

    Returns:
        The number of batch norms folded.

    Raises:
        PruneError: The network is in training mode; or its outputs differ once folded, as they do if a convolution
            changes its weights before it uses them. The network stays folded then and must not be used.
    """
    if model.training:
        raise PruneError("batch norms can be folded in evaluation mode only; call model.eval() first")
    before = logits_of(model(images))
    pairs = _find_pairs(model, images)
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var]
        model.set_submodule(norm_name, _without_normalisation(norm))
    after = logits_of(model(images))
    difference = relative_difference(before, after)
    if not difference <= CLOSE:
        raise PruneError(
            f"with {len(pairs)} batch norms folded the network answers otherwise (logits differ by {difference:.1e} of "
            "the largest): it uses its convolutions in a way that folding does not see. Load it without folding."
        )
    return len(pairs)


def relative_difference(expected: Any, actual: Any) -> float:
    """The largest absolute difference of two outputs, in units of the largest absolute ``expected`` value.

    Args:
        expected: floating-point logits (n, classes), or outputs of any form; each tensor is compared by itself.
        actual: outputs of the same form for the same images.

    Returns:
        The largest over all tensors.
    """
    pairs = zip(tree_leaves(expected), tree_leaves(actual), strict=True)
    return max(float((b - a).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs if isinstance(a, Tensor))


def _without_normalisation(norm: nn.Module) -> nn.Module:
    """The other modules of a norm: timm's BatchNormAct2d contains dropout and activation."""
    remaining = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(*remaining) if remaining else nn.Identity()


def _find_pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) pairs whose first output goes to the second and nowhere else."""
    conv_outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept alive, so that no id is used twice
    calls: Counter[str] = Counter()
    uses = _Uses()
    candidates: list[tuple[str, str, int]] = []

    def left(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            calls[name] += 1
            conv_outputs[id(out)] = (name, out)
            uses.of.pop(id(out), None)  # a tensor that is gone may have had this number

        return hook

    def entered(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            calls[name] += 1
            x = inputs[0] if inputs else next(iter(named.values()), None)
            if id(x) in conv_outputs:
                candidates.append((conv_outputs[id(x)][0], name, id(x)))

        return hook

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, FOLDED):
            hooks.append(module.register_forward_hook(left(name)))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(entered(name), with_kwargs=True))
    try:
        with uses:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (conv, norm) for conv, norm, tensor in candidates if calls[conv] == calls[norm] == 1 and uses.of[tensor] == 1
    ]
