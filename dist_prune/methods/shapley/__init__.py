"""Shapley values rank channels by their mean contribution to accuracy over coalitions of the other channels.

Ancona, Oztireli, Gross: Shapley value as principled metric for structured network pruning, 2020 (permutations).
Adamczewski, Li, Van Gool: Shapley Pruning for Neural Network Compression, 2024, arXiv 2407.15875 (regression, partial
sums over set sizes).

In the game of a group its channels are the players, and the value of a coalition is the accuracy of the network without
the other channels of the group. All other groups are whole. The score of a channel is its estimated Shapley value, in
percent of accuracy; a plan removes the channels with the smallest values.

Files:
    method.py: the method: what is measured, how values become a plan, rows and figures of the report.
    options.py: its keys in a recipe.
    estimators.py: coalitions that are measured, and the values that follow from their accuracies.
    quirks.py: departures of the released program.
"""

from dist_prune.methods.shapley.method import Shapley

__all__ = ["Shapley"]
