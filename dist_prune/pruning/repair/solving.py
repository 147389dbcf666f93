"""The change of a layer's weights and bias from second moments: ridge regression, and the ridge that suits it."""

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
        weight, bias = _solve(both, ridge, intercept)
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
    xx, xr, _ = _about_means(own, own, intercept)
    values, vectors = torch.linalg.eigh(xx)
    basis = vectors.transpose(1, 2)
    along = basis @ xr  # a ridge l has the weights V diag(1 / (values + l)) along
    xx, xr, rr = _about_means(judged, own, intercept)
    # sums over outputs, so that a ridge costs a product with a vector: tr(W' xx W) = f' ((V' xx V) * (along along')) f
    squares = (basis @ xx @ vectors) * (along @ along.transpose(1, 2))
    products = ((basis @ xr) * along).sum(2)
    scale = _scale(own)
    for number, ridge in enumerate(RIDGES):
        f = 1 / (values.clamp_min(0) + (ridge * scale).clamp_min(1e-30)[:, None])
        left = rr.sum() - 2 * (products * f).sum() + (f * (squares @ f[:, :, None])[:, :, 0]).sum()
        found[number] = float(left)
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


def _scale(sums: dict[str, Tensor]) -> Tensor:
    """(g,) mean second moment of the inputs, which ridges are relative to."""
    return (sums["xx"].diagonal(dim1=1, dim2=2) / sums["n"]).mean(1)


def _about_means(sums: dict[str, Tensor], centre: dict[str, Tensor], intercept: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean products xx (g, d, d), xr (g, d, o) and rr (g, o), with an intercept about the means of ``centre``."""
    n = sums["n"]
    xx, xr, rr = (sums[name] / n for name in ("xx", "xr", "rr"))
    if not intercept:
        return xx, xr, rr
    x, r = (sums[name] / n for name in ("x", "r"))
    mean_x, mean_r = (centre[name] / centre["n"] for name in ("x", "r"))
    across = x[:, :, None] * mean_x[:, None, :]
    xx = xx - across - across.transpose(1, 2) + mean_x[:, :, None] * mean_x[:, None, :]
    xr = xr - x[:, :, None] * mean_r[:, None] - mean_x[:, :, None] * r[:, None] + mean_x[:, :, None] * mean_r[:, None]
    return xx, xr, rr - 2 * r * mean_r + mean_r.square()


def _solve(sums: dict[str, Tensor], ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """Weights (g, d, o) and biases (g, o)."""
    xx, xr, _ = _about_means(sums, sums, intercept)
    xx.diagonal(dim1=1, dim2=2).add_((ridge * _scale(sums)).clamp_min(1e-30)[:, None])
    factor, failed = torch.linalg.cholesky_ex(xx)
    if bool(failed.any()):  # rounding has made it indefinite
        values, vectors = torch.linalg.eigh(xx)
        weight = vectors @ ((vectors.transpose(1, 2) @ xr) / values.clamp_min(1e-30)[:, :, None])
    else:
        weight = torch.cholesky_solve(xr, factor)
    mean_x, mean_r = (sums[name] / sums["n"] for name in ("x", "r"))
    bias = mean_r - (mean_x[:, None, :] @ weight)[:, 0] if intercept else torch.zeros_like(mean_r)
    return weight, bias


def _errors(sums: dict[str, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """(g, o) sums of squares of r - x weight - bias."""
    fitted = ((sums["xx"] @ weight) * weight).sum(1) - 2 * (sums["xr"] * weight).sum(1)
    shift = sums["n"] * bias.square() - 2 * bias * sums["r"] + 2 * bias * (sums["x"][:, None, :] @ weight)[:, 0]
    return sums["rr"] + fitted + shift
