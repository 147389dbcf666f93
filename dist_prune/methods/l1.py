"""L1 magnitude: a filter's score is the sum of its absolute weights.

Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dist_prune.methods import method
from dist_prune.methods.method import for_select
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.choose import Request, combined, keep_best, orders_of
from dist_prune.pruning.plan import Plan


class Options(method.MethodOptions):
    """``combine``: how the layers of a coupled group become one score; each layer is divided by its mean first."""

    combine: Literal["leader", "sum", "mean"] = for_select("sum")


class L1(method.Method):
    """Small filters go first."""

    paper = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"
    units = True
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """``<site>``: (C,) float64, the L1 norm of each filter."""
        return {site.name: bench.weight(site).double().abs().flatten(1).sum(1) for site in bench.sites}

    def orders(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, list[int]]:
        return orders_of(self._worth(scores, channels))

    def select(self, scores: Mapping[str, Tensor], channels: Channels, request: Request) -> Plan:
        return Plan.keeping(channels, keep_best(channels, self._worth(scores, channels), request))

    def _worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return {
            group.name: combined([self.need(scores, name) for name in group.producers], self.options.combine)
            for group in channels.free
        }
