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


def bias_change(moments: SecondMoments) -> Change:
    """The change of the bias alone: the mean of the errors."""
    sums = _both(moments)
    n = sums["n"]
    bias = sums["r"] / n
    before = float(sums["rr"].sum() / n)
    return Change(torch.zeros_like(sums["xr"]), bias, 0.0, before, before - float(bias.square().sum()))


def ridge_change(moments: SecondMoments, ridge: float | None, intercept: bool) -> Change:
    """The change of weights and bias that takes most of the error away.

    Args:
        moments: of the layer.
        ridge: relative to the mean of the inputs' second moments; None: the one of ``RIDGES`` whose solution from one
            half of the images leaves the smallest error on the other half, on average.
        intercept: whether the layer has a place for a bias.
    """
    first, second = moments.totals()
    both = {name: first[name] + second[name] for name in first}
    if ridge is None:
        ridge = _held_out_ridge(first, second, intercept)
    if ridge is None:
        weight, bias, chosen = torch.zeros_like(both["xr"]), torch.zeros_like(both["r"]), float("inf")
    else:
        (weight, bias), chosen = _solve(both, [ridge], intercept)[0], ridge
    before = float(both["rr"].sum() / both["n"])
    after = float(_errors(both, weight, bias).sum() / both["n"])
    return Change(weight, bias, chosen, before, after)


def _both(moments: SecondMoments) -> dict[str, Tensor]:
    first, second = moments.totals()
    return {name: first[name] + second[name] for name in first}


def _held_out_ridge(first: dict[str, Tensor], second: dict[str, Tensor], intercept: bool) -> float | None:
    """The ridge that does best on the half that it was not fitted to; None if no change does better than none."""
    if not float(first["n"]) or not float(second["n"]):
        return 1e-3
    found = torch.zeros(len(RIDGES), dtype=torch.float64)
    for fitted, judged in ((first, second), (second, first)):
        for number, (weight, bias) in enumerate(_solve(fitted, RIDGES, intercept)):
            found[number] += _errors(judged, weight, bias).sum().cpu() / judged["n"].cpu()[0]
    nothing = float(sum((half["rr"].sum() / half["n"][0] for half in (first, second)), torch.zeros(()).to(first["n"])))
    best = int(found.argmin())
    return RIDGES[best] if float(found[best]) < nothing else None


def _solve(
    sums: dict[str, Tensor], ridges: tuple[float, ...] | list[float], intercept: bool
) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) for each ridge."""
    n = sums["n"]
    mean_x, mean_r = sums["x"] / n, sums["r"] / n
    xx, xr = sums["xx"] / n, sums["xr"] / n
    if intercept:
        xx = xx - mean_x[:, :, None] * mean_x[:, None, :]
        xr = xr - mean_x[:, :, None] * mean_r[:, None, :]
    scale = (sums["xx"].diagonal(dim1=1, dim2=2) / n).mean(1)
    values, vectors = torch.linalg.eigh(xx)
    rotated = vectors.transpose(1, 2) @ xr
    out = []
    for ridge in ridges:
        penalty = (ridge * scale).clamp_min(1e-30)
        weight = vectors @ (rotated / (values.clamp_min(0) + penalty[:, None])[:, :, None])
        bias = mean_r - (mean_x[:, None, :] @ weight)[:, 0] if intercept else torch.zeros_like(mean_r)
        out.append((weight, bias))
    return out


def _errors(sums: dict[str, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """(g, o) sums of squares of r - x weight - bias."""
    fitted = ((sums["xx"] @ weight) * weight).sum(1) - 2 * (sums["xr"] * weight).sum(1)
    shift = sums["n"] * bias.square() - 2 * bias * sums["r"] + 2 * bias * (sums["x"][:, None, :] @ weight)[:, 0]
    return sums["rr"] + fitted + shift
