"""Batch norms folded into the convolutions before them: a network as it is served, not as it is trained.

A batch norm in evaluation mode scales and shifts a channel, and so can the convolution's own weights. What is left
reads and writes each feature map once less; a pruned network gains most, since its convolutions have become cheap.
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

FOLDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLOSE = 1e-3  # of the largest logit: float32 rounds otherwise after folding


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
    """Folds in place each batch norm whose only input is a convolution that nothing else reads; how many.

    Args:
        model: in evaluation mode, a network that answers the same twice.
        images: (N, C, H, W) of the network's input, to watch where tensors go, and to compare answers.

    Raises:
        PruneError: the network is in training mode, or answers otherwise once folded; it stays folded then, and is not
            to be used (a convolution that changes its weights before it uses them does that).
    """
    if model.training:
        raise PruneError("batch norms can be folded in evaluation mode only; call model.eval() first")
    before = model(images)
    pairs = _pairs(model, images)
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var]
        model.set_submodule(norm_name, _rest(norm))
    after = model(images)
    difference = relative_difference(before, after)
    if not difference <= CLOSE:
        raise PruneError(
            f"with {len(pairs)} batch norms folded the network answers otherwise (logits differ by {difference:.1e} of the "
            "largest): it uses its convolutions in a way that folding does not see. Load it without folding."
        )
    return len(pairs)


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """The largest absolute difference of two tensors of logits, in units of the largest absolute ``expected`` logit.

    Args:
        expected, found: (n, classes) floating-point logits of the same images.
    """
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _rest(norm: nn.Module) -> nn.Module:
    """What a norm does beside normalising: timm's BatchNormAct2d drops and activates."""
    remaining = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(*remaining) if remaining else nn.Identity()


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """(convolution, batch norm) names, where the one's output goes to the other and nowhere else."""
    conv_outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no number is given twice
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
