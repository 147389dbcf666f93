"""Network slimming: a channel is as important as the scale of its batch norm.

Liu, Li, Shen, Huang, Yan, Zhang: Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.channel_tensors import sum_by_channel
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, HookPoint
from dist_prune.pruning.selection.group_scores import protect, reduce_group


class BnScale(base.RankingMethod):
    """The absolute scale; a coupled group has several. (The paper ranks all layers together: select.scope global,
    method.normalise false.)"""

    paper = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    units = True
    Options = base.CoupledOptions

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<norm>``: (C,) float64 absolute scales."""
        scores, graph = {}, self.prunable(context.graph)
        for group in graph.free:
            for norm in norms(graph, group):
                point = HookPoint(norm.layer, group.name, graph.layers[norm.layer].width_out, "norm", False)
                scores[norm.layer] = context.weight(point).double().abs()
        return scores

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        return protect(graph, lambda group: "" if any(norms(graph, group)) else "no batch norm scales its channels")

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        found = {}
        for group in graph.free:
            parts = [sum_by_channel(self.require_score(scores, n.layer), n, group.width) for n in norms(graph, group)]
            # one scale per channel is the paper's case: left as it is, so that layers can be ranked together
            found[group.name] = parts[0] if len(parts) == 1 else reduce_group(parts, self.options.combine)
        return found


def norms(graph: DependencyGraph, group: ChannelGroup) -> Iterator[Coupling]:
    """The batch norms with a scale (and a shift) of their own."""
    for coupling in group.couplings:
        layer = graph.layers[coupling.layer]
        if layer.kind == "norm" and layer.bias:
            yield coupling
