"""DepGraph's group norm: the squared norm of all weights that are removed with a channel.

Fang, Ma, Song, Mi, Wang: DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3.3:

    I_k = sum over the layers w of the group of ||w[k]||_2^2

w[k] are the weights of channel k: a producer's filter, a consumer's input slice, a batch norm's scale. It needs no
images, labels or gradients.
"""

import torch

from dist_prune.methods import base
from dist_prune.methods.needs import WEIGHTS_ALONE
from dist_prune.pruning.graph.channel_tensors import sum_by_channel
from dist_prune.pruning.graph.groups import HookPoint


class GroupNorm(base.RankingMethod):
    """Channels whose tied weights have a small norm go first."""

    paper = "Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023"
    needs = WEIGHTS_ALONE
    units = True

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Add the squared weights of every layer of each group.

        Returns:
            ``<group>``: (C,) float64, squared norm over all weights and batch-norm scales of the channel.
        """
        scores, graph = {}, context.graph
        for group in graph.free:
            norms = []
            for coupling in group.couplings:
                layer = graph.layers[coupling.layer]
                if layer.kind in ("pool", "table", "parameter") or (layer.kind.endswith("norm") and not layer.bias):
                    continue
                if coupling.side == "in" and layer.groups > 1 and not layer.depthwise:
                    continue  # whole filters of a grouped convolution are removed; they count at its outputs
                weight = context.weight(HookPoint(layer.name, group.name, layer.width_out, layer.kind, False)).double()
                side = weight.transpose(0, 1) if coupling.side == "in" and not layer.depthwise else weight
                norms.append(sum_by_channel(side.reshape(len(side), -1).square().sum(1), coupling, group.width))
            scores[group.name] = torch.stack(norms).sum(0)
        return scores
