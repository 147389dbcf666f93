"""Sensitivity Pruner learns masks of filters next to a single-shot target, round by round, with surgery in between.

Guo, Lai, Yang, Zhao, Shen: Sensitivity pruner: filter-level compression algorithm for deep neural networks, Pattern
Recognition 2023. The sensitivity: Lee, Ajanthan, Torr: SNIP: single-shot network pruning based on connection
sensitivity, ICLR 2019.

At every update a copy of the dense network with re-drawn weights gives the sensitivity |W * dL/dW| of its filters, and
the filters with the largest ones are the target mask. A small convolution over the sensitivities makes a mask in (0, 1)
of each group, which trains together with the weights; a penalty draws it to the target. The score of a channel is its
learned mask. A plan removes the channels that the masks cut; with a target or a keep ratio it ranks channels by them.

Files:
    method.py: the method: the rounds of training, how masks become a plan.
    options.py: its keys in a recipe.
    single_shot.py: the sensitivities and target masks of a round, update by update.
    snip.py: formulas of the sensitivity, the target, the vote of a mask and its schedule.
    mask_learner.py: the masks and the network that learns them.
    restore_width.py: trained weights of a pruned network in dense shapes.
    quirks.py: departures of the released programs.
"""

from dist_prune.methods.sensitivity.method import Sensitivity

__all__ = ["Sensitivity"]
