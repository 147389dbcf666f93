"""Network slimming: the absolute scale of a channel's batch norm.

Liu, Li, Shen, Huang, Yan, Zhang: Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, section
3:

    s_i = |gamma_i|

The paper trains with an L1 penalty on the scales first (``train.sparsity=bn_scale``), and ranks all layers together
(``select.scope=global method.normalise=false``). It needs no images, labels or gradients.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import WEIGHTS_ALONE
from dist_prune.pruning.graph.channel_tensors import sum_by_channel
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, HookPoint
from dist_prune.pruning.selection.group_scores import protect, reduce_group


class BnScale(base.RankingMethod):
    """Channels whose batch norm has a small scale go first; a coupled group has several batch norms.

    Groups without a batch norm are protected.
    """

    paper = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    needs = WEIGHTS_ALONE
    units = True
    Options = base.CoupledOptions

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Take the absolute scales of all batch norms.

        Returns:
            ``<norm>``, the module path of each batch norm of a free group: (C,) float64 absolute scales.
        """
        scores, graph = {}, self.prunable(context.graph)
        for group in graph.free:
            for norm in affine_norms(graph, group):
                point = HookPoint(norm.layer, group.name, graph.layers[norm.layer].width_out, "norm", False)
                scores[norm.layer] = context.weight(point).double().abs()
        return scores

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        return protect(
            graph, lambda group: "" if any(affine_norms(graph, group)) else "no batch norm scales its channels"
        )

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        importance = {}
        for group in graph.free:
            norms = list(affine_norms(graph, group))
            scales = [sum_by_channel(self.require_score(scores, norm.layer), norm, group.width) for norm in norms]
            # one scale per channel is the paper's case: left as it is, so that layers can be ranked together
            importance[group.name] = scales[0] if len(scales) == 1 else reduce_group(scales, self.options.combine)
        return importance


def affine_norms(graph: DependencyGraph, group: ChannelGroup) -> Iterator[Coupling]:
    """The couplings of a group with norms that have a scale and a shift of their own."""
    for coupling in group.couplings:
        layer = graph.layers[coupling.layer]
        if layer.kind == "norm" and layer.bias:
            yield coupling
