"""Dirichlet switches rank channels by a vector on the simplex, trained with the weights frozen.

Adamczewski, Park: Dirichlet Pruning for Neural Network Compression, AISTATS 2021 (arXiv 2011.05985).

The channels of a layer are multiplied by a random vector s on the simplex, with the prior Dir(alpha, ..., alpha) and
the posterior q(s) = Dir(phi). The training maximises the evidence lower bound over phi, for one layer at a time. The
score of a channel is its posterior mean phi_c / sum(phi); a plan removes the channels with the smallest ones. The
logistic normal posterior is an addition of this package.

Files:
    method.py: the method: what is scored, how scores become a plan, rows and figures of the report.
    options.py: its keys in a recipe.
    switch_training.py: the loss of the switches of some groups, batch by batch.
    posteriors.py: the distributions, their divergence from the prior, their moments.
    quirks.py: departures of the released program.
"""

from dist_prune.methods.dirichlet.method import DirichletSwitches

__all__ = ["DirichletSwitches"]
