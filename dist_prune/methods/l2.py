"""L2 magnitude: a filter's score is the Euclidean norm of its weights, its bias left out.

He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018, equation
2.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.choose import Request, combined, keep_best
from dist_prune.pruning.plan import Plan


class Options(method.MethodOptions):
    """``combine``: how the layers of a coupled group become one score; each layer is divided by its mean first."""

    combine: Literal["leader", "sum", "mean"] = method.for_select("sum")


class L2(method.Method):
    """Small filters go first."""

    paper = "He et al., Soft Filter Pruning, IJCAI 2018 (its criterion; cut at once)"
    units = True
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """``<site>``: (C,) float64, the L2 norm of each filter."""
        return {site.name: bench.weight(site).double().flatten(1).norm(dim=1) for site in bench.sites}

    def select(self, scores: Mapping[str, Tensor], channels: Channels, request: Request) -> Plan:
        worth = {
            group.name: combined([self.need(scores, name) for name in group.producers], self.options.combine)
            for group in channels.free
        }
        return Plan.keeping(channels, keep_best(channels, worth, request))
