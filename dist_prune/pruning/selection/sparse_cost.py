"""Sizes of a network with zeros: non-zero weights, bytes of sparse matrices, MACs that masks would save."""

import io
from collections.abc import Mapping
from typing import Any

from scipy import sparse
from torch import Tensor

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.block_masks import weight_masks
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import macs


def sparse_sizes(
    graph: DependencyGraph, plan: Plan, weights: Mapping[str, Tensor], dense: bool = False
) -> dict[str, Any]:
    """Measure a network without counting its zeros (MINT's measures: no batch norm, no bias).

    Args:
        graph: dependency graph of the dense network.
        plan: a plan in coordinates of the dense network.
        weights: state dict of the network that the plan left; with ``dense`` of the dense network.
        dense: whether ``weights`` are those of the dense network.

    Returns:
        ``weights`` and ``nonzero``: entries of the weights of convolutions and linear layers. ``pruned_percent``: share
        of the dense network's weights that are removed or zero. ``csr_bytes``: bytes of compressed .npz files of the
        weights as CSR matrices (out, rest). ``dense_bytes``: bytes of the float32 arrays. ``masked_macs``: MACs of
        weights that no mask keeps at zero; hardware that skips zero blocks does these, dense kernels do all.
    """
    layers = {n: layer for n, layer in graph.layers.items() if layer.kind in ("conv", "linear")}
    total = sum(layer.width_out * (layer.width_in // layer.groups) * layer.kernel for layer in layers.values())
    kept = {name: weights[f"{name}.weight"].detach().cpu() for name in layers}
    nonzero = sum(int((weight != 0).sum()) for weight in kept.values())
    saved = 0
    if not dense:
        for name, mask in weight_masks(plan, graph, weights).items():
            saved += int((~mask).sum()) * layers[name.removesuffix(".weight")].positions
    return {
        "weights": sum(weight.numel() for weight in kept.values()),
        "nonzero": nonzero,
        "pruned_percent": 100 * (1 - nonzero / total),
        "csr_bytes": sum(csr_bytes(weight) for weight in kept.values()),
        "dense_bytes": sum(4 * weight.numel() for weight in kept.values()),
        "masked_macs": macs(graph, {} if dense else plan.counts) - saved,
    }


def csr_bytes(weight: Tensor) -> int:
    """Count the bytes of SciPy's compressed .npz of a weight (out, ...) as a float32 CSR matrix (out, rest)."""
    file = io.BytesIO()
    sparse.save_npz(file, sparse.csr_matrix(weight.detach().cpu().float().flatten(1).numpy()), compressed=True)
    return len(file.getvalue())
