"""The method of Dirichlet switches: posteriors of every group, and the plan that keeps the largest means.

Adamczewski, Park: Dirichlet Pruning for Neural Network Compression, AISTATS 2021. s ~ q(s) = Dir(phi), phi =
softplus(v), prior Dir(alpha). The loss is the negative evidence lower bound; a channel's score is its posterior mean.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.methods.dirichlet import quirks
from dist_prune.methods.dirichlet.options import Options
from dist_prune.methods.dirichlet.posteriors import correlation, moments
from dist_prune.methods.dirichlet.switch_training import SwitchTraining
from dist_prune.methods.needs import Needs
from dist_prune.pruning.figure_data import SimilarityMap
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.ranking import SelectionRequest


class DirichletSwitches(base.RankingMethod):
    """Keeps the channels with the largest posterior means of their switches."""

    paper = "Adamczewski, Park, Dirichlet Pruning for Neural Network Compression, AISTATS 2021"
    needs = Needs(
        labels=True, gradients=True, training=True, forward=None, backward=None, note="epochs of training gates"
    )
    task_needs = ("class labels", "class logits")
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Train the switches of every free group.

        Returns:
            For each free group ``<group>:posterior``, float64: (1, C) phi of the Dirichlet distribution, or
            (2 + rank, C) mu, diagonal and factor of the logistic normal.

        Raises:
            PruneError: the training diverged.
        """
        names = [group.name for group in context.graph.free]
        if self.options.jointly:
            tables = self._train(context, names)
        else:
            tables = context.map_jobs(names, lambda name: self._train(context, [name])[0])
        for name, table in zip(names, tables, strict=True):
            if not bool(table.isfinite().all()):
                raise PruneError(f"method.lr: the switches of {name} became infinite; lower it from {self.options.lr}")
        return {f"{name}:posterior": table for name, table in zip(names, tables, strict=True)}

    def _train(self, context: base.ScoringContext, names: list[str]) -> list[Tensor]:
        """Train these groups' switches together; the tables of their posteriors."""
        options = self.options
        training = SwitchTraining(options, context, names)
        momentum = {"momentum": options.momentum} if options.optimizer == "sgd" else {}
        context.train_parameters(
            [p for posterior in training.posteriors for p in posterior.parameters],
            training.loss,
            options.epochs,
            options.lr,
            options.batch,
            training.watch,
            name=f"switches of {', '.join(names)}",
            calibration=True,
            train_mode=self.has("batch_statistics"),
            optimizer=options.optimizer,
            weight_decay=options.weight_decay,
            decay_norm_bias=True,
            **momentum,
        )
        return [posterior.table() for posterior in training.posteriors]

    def _ranking(self, scores: Mapping[str, Tensor], name: str) -> Tensor:
        mean = moments(self.require_score(scores, f"{name}:posterior"))[0]
        return quirks.reversed_ranking(mean) if self.has("reversed_ranking") else mean

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """Read the posterior mean of each channel: free group -> (C,) float64."""
        return {group.name: self._ranking(scores, group.name) for group in graph.free}

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """List moments of each group's posterior.

        ``smallest_gate`` and ``largest_gate`` are posterior means times the width (mean 1), ``correlation_from`` and
        ``correlation_to`` the range of correlations between two channels, ``positive_percent`` the pairs with a
        positive one.
        """
        rows = []
        for group in graph.free:
            mean, covariance = moments(self.require_score(scores, f"{group.name}:posterior"))
            low, high, positive = _correlation_range(covariance)
            gate = mean * group.width
            rows.append({
                "group": group.name, "smallest_gate": float(gate.min()), "largest_gate": float(gate.max()),
                "correlation_from": low, "correlation_to": high, "positive_percent": positive,
            })  # fmt: skip
        return rows

    def similarity_maps(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterator[SimilarityMap]:
        """Draw the posterior's correlation between channels, dark if two rise together (in a Dirichlet none do)."""
        plan = self.select(scores, graph, request)
        for group in graph.free:
            _, covariance = moments(self.require_score(scores, f"{group.name}:posterior"))
            low, high, positive = _correlation_range(covariance)
            kept = np.zeros(group.width, dtype=bool)
            kept[plan.kept(group.name)] = True
            caption = (
                f"{group.width} channels, {int(kept.sum())} kept; posterior correlation {low:.3g} to {high:.3g}, "
                f"{positive:.0f} % of the pairs positive"
            )
            similarity = ((1 + correlation(covariance)) / 2).clamp(0, 1).numpy()
            yield SimilarityMap(group.name, similarity, np.full(group.width, -1), kept, caption)


def _correlation_range(covariance: Tensor) -> tuple[float, float, float]:
    """Smallest and largest correlation between two channels, and the percentage of pairs with a positive one."""
    table = correlation(covariance)
    pairs = table[~torch.eye(len(table), dtype=torch.bool)]
    return float(pairs.min()), float(pairs.max()), 100 * float((pairs > 0).double().mean())
