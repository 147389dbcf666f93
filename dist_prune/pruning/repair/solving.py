"""The change of a layer's weights and bias from second moments: ridge regression, and the ridge that suits it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_prune.pruning.repair.second_moments import SecondMoments

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # tried for ``auto``


@dataclass(frozen=True)
class Change:
    """What is added to a layer's weights.

    Attributes:
        weight: (g, d, o) float64, added to the weights of the inputs d of each output.
        bias: (g, o) float64; zeros if the layer has no place for a bias.
        ridge: the ridge, relative to the mean of the inputs' second moments.
        error_before: mean square of the errors before the repair.
        error_after: the same after it, on the images that gave it.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    error_before: float
    error_after: float


def bias_change(moments: SecondMoments, inputs: int) -> Change:
    """The change of the bias alone: the mean of the errors.

    Args:
        moments: of the layer; their inputs are not read.
        inputs: of one output of the layer, d.
    """
    sums = _both(moments)
    n = sums["n"]
    bias = sums["r"] / n
    before = float(sums["rr"].sum() / n)
    still = torch.zeros((len(bias), inputs, bias.shape[1]), dtype=torch.float64, device=bias.device)
    return Change(still, bias, 0.0, before, before - float(bias.square().sum()))


def ridge_change(moments: SecondMoments, ridge: float | None, intercept: bool) -> Change:
    """The change of weights and bias that takes most of the error away.

    Args:
        moments: of the layer.
        ridge: relative to the mean of the inputs' second moments; None: the layer stays as it is.
        intercept: whether the layer has a place for a bias.
    """
    both = _both(moments)
    if ridge is None:
        weight, bias, chosen = torch.zeros_like(both["xr"]), torch.zeros_like(both["r"]), float("inf")
    else:
        weight, bias = _solve(both, (ridge,), intercept)
        chosen = ridge
    before = float(both["rr"].sum() / both["n"])
    after = float(_errors(both, weight, bias).sum() / both["n"])
    return Change(weight, bias, chosen, before, after)


def held_out_errors(moments: SecondMoments, fitted: int, intercept: bool) -> Tensor:
    """What each ridge leaves of the errors on the half that it was not fitted to.

    Args:
        moments: of the layer.
        fitted: the half that the solutions come from, 0 or 1.
        intercept: whether the layer has a place for a bias.

    Returns:
        (len(RIDGES) + 1,) float64 on the CPU, mean squares; the last one without any change. Zeros if a half is empty.
    """
    own, judged = (moments.totals()[half] for half in (fitted, 1 - fitted))
    found = torch.zeros(len(RIDGES) + 1, dtype=torch.float64)
    if not float(own["n"]) or not float(judged["n"]):
        return found
    weight, bias = _solve(own, RIDGES, intercept)
    errors = _errors(judged, weight, bias).view(len(own["xx"]), len(RIDGES), -1).sum((0, 2))
    found[:-1] = (errors / judged["n"]).cpu()
    found[-1] = float(judged["rr"].sum() / judged["n"])
    return found


def best_ridge(errors: Tensor) -> float | None:
    """The ridge that does best on the images that it was not fitted to; None if no change does better than none.

    Args:
        errors: the sum of ``held_out_errors`` of both halves. Without errors nothing was held out: 1e-3.
    """
    if not float(errors.abs().sum()):
        return 1e-3
    best = int(errors[:-1].argmin())
    return RIDGES[best] if float(errors[best]) < float(errors[-1]) else None


def _both(moments: SecondMoments) -> dict[str, Tensor]:
    first, second = moments.totals()
    return {name: first[name] + second[name] for name in first}


def _solve(sums: dict[str, Tensor], ridges: Sequence[float], intercept: bool) -> tuple[Tensor, Tensor]:
    """Weights (g, d, ridges o) and biases (g, ridges o), one ridge beside the other."""
    n = sums["n"]
    mean_x, mean_r = sums["x"] / n, sums["r"] / n
    xx, xr = sums["xx"] / n, sums["xr"] / n
    if intercept:
        xx = xx - mean_x[:, :, None] * mean_x[:, None, :]
        xr = xr - mean_x[:, :, None] * mean_r[:, None, :]
    scale = (sums["xx"].diagonal(dim1=1, dim2=2) / n).mean(1)
    weights = []
    for ridge in ridges:
        table = xx.clone()
        table.diagonal(dim1=1, dim2=2).add_((ridge * scale).clamp_min(1e-30)[:, None])
        factor, failed = torch.linalg.cholesky_ex(table)
        if bool(failed.any()):  # rounding has made it indefinite
            values, vectors = torch.linalg.eigh(table)
            weights.append(vectors @ ((vectors.transpose(1, 2) @ xr) / values.clamp_min(1e-30)[:, :, None]))
        else:
            weights.append(torch.cholesky_solve(xr, factor))
    weight = torch.cat(weights, 2)
    bias = mean_r.repeat(1, len(ridges))
    bias = bias - (mean_x[:, None, :] @ weight)[:, 0] if intercept else torch.zeros_like(bias)
    return weight, bias


def _errors(sums: dict[str, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """(g, k o) sums of squares of r - x weight - bias, for k weights beside one another."""
    times = weight.shape[2] // sums["r"].shape[1]
    rr, r, xr = (sums[name].repeat(*[1] * (sums[name].dim() - 1), times) for name in ("rr", "r", "xr"))
    fitted = ((sums["xx"] @ weight) * weight).sum(1) - 2 * (xr * weight).sum(1)
    shift = sums["n"] * bias.square() - 2 * bias * r + 2 * bias * (sums["x"][:, None, :] @ weight)[:, 0]
    return rr + fitted + shift
