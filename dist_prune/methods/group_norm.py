"""DepGraph's group norm: all weights tied to a channel, in every layer of its group, on both sides.

Fang, Ma, Song, Mi, Wang: DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3.3.
"""

import torch

from dist_prune.methods import base
from dist_prune.pruning.graph.channel_tensors import sum_by_channel
from dist_prune.pruning.graph.groups import HookPoint


class GroupNorm(base.RankingMethod):
    """The sum of squares of everything that goes when the channel goes."""

    paper = "Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023"
    units = True

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<group>``: (C,) float64, squared norm over all weights and batch-norm scales tied to the channel."""
        scores, graph = {}, context.graph
        for group in graph.free:
            parts = []
            for coupling in group.couplings:
                layer = graph.layers[coupling.layer]
                if layer.kind in ("pool", "table") or (layer.kind == "norm" and not layer.bias):
                    continue
                if coupling.side == "in" and layer.groups > 1 and not layer.depthwise:
                    continue  # its filters go whole, and are counted at the outputs
                weight = context.weight(HookPoint(layer.name, group.name, layer.width_out, layer.kind, False)).double()
                side = weight.transpose(0, 1) if coupling.side == "in" and not layer.depthwise else weight
                parts.append(sum_by_channel(side.reshape(len(side), -1).square().sum(1), coupling, group.width))
            scores[group.name] = torch.stack(parts).sum(0)
        return scores
