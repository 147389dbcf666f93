"""Network slimming: a channel is as important as the scale of its batch norm.

Liu, Li, Shen, Huang, Yan, Zhang: Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channel_tensors import gathered
from dist_prune.pruning.channels import ChannelGroup, Channels, Coupling, Site
from dist_prune.pruning.combine import combined, judged


class BnScale(method.Ranking):
    """The absolute scale; a coupled group has several. (The paper ranks all layers together: select.scope global,
    method.normalise false.)"""

    paper = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    units = True
    Options = method.CoupledOptions

    def score(self, bench: method.Bench) -> method.Scores:
        """``<norm>``: (C,) float64 absolute scales."""
        scores, channels = {}, self.limits(bench.channels)
        for group in channels.free:
            for norm in norms(channels, group):
                site = Site(norm.layer, group.name, channels.layers[norm.layer].width_out, "norm", False)
                scores[norm.layer] = bench.weight(site).double().abs()
        return scores

    def limits(self, channels: Channels) -> Channels:
        return judged(
            channels, lambda group: "" if any(norms(channels, group)) else "no batch norm scales its channels"
        )

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        found = {}
        for group in channels.free:
            parts = [gathered(self.need(scores, n.layer), n, group.width) for n in norms(channels, group)]
            # one scale per channel is the paper's case: left as it is, so that layers can be ranked together
            found[group.name] = parts[0] if len(parts) == 1 else combined(parts, self.options.combine)
        return found


def norms(channels: Channels, group: ChannelGroup) -> Iterator[Coupling]:
    """The batch norms with a scale (and a shift) of their own."""
    for coupling in group.couplings:
        layer = channels.layers[coupling.layer]
        if layer.kind == "norm" and layer.bias:
            yield coupling
