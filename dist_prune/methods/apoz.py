"""APoZ: a channel whose activations are mostly zero says little.

Hu, Peng, Tai, Tang: Network Trimming: A Data-Driven Neuron Pruning Approach, 2016 (arXiv 1607.03250), section 3.
"""

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods import method
from dist_prune.pruning.channels import Channels, Site
from dist_prune.pruning.consumers import consumer_sites, flatten_maps, flatten_tables, map_consumers, sum_consumers
from dist_prune.pruning.statistic import State, Statistic


class Apoz(method.Ranking):
    """One minus the share of zeros among the channel's activations, where the next layer consumes them."""

    paper = "Hu et al., Network Trimming: A Data-Driven Neuron Pruning Approach, 2016"

    def score(self, bench: method.Bench) -> method.Scores:
        """``<layer>:in:zeros`` and ``<layer>:in:count`` (positions,) int64: zero activations, and all of them."""
        found = bench.observe(consumer_sites(bench.channels, map_consumers), Zeros())
        if sum(int(tables["zeros"].sum()) for tables in found.values()) == 0:
            raise PruneError(
                "apoz: not one activation is exactly zero; it counts the zeros behind a ReLU, and this network has "
                "another activation. Choose a criterion of weights or gradients ('dist-prune list methods')."
            )
        return flatten_tables(found)

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        zeros, count = (sum_consumers(scores, channels, state, map_consumers) for state in ("zeros", "count"))
        return {name: 1 - zeros[name].double() / count[name].double() for name in zeros}


class Zeros(Statistic):
    """States: ``zeros`` and ``count`` (C,) int64 per position of the layer's input."""

    def states(self, site: Site) -> dict[str, State]:
        return {"zeros": State("sum", (site.width,)), "count": State("sum", (site.width,))}

    def update(
        self, site: Site, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        values = flatten_maps(maps, site)
        tables["zeros"] += (values == 0).sum((0, 2))
        tables["count"] += values.shape[0] * values.shape[2]
