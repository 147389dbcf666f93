"""Entropy ranking deletes the filters of a layer one by one, first the one about which the others tell most.

Interpretable deep model pruning, Neurocomputing 647 (2025) 130485. The entropies: Sanchez Giraldo, Rao, Principe:
Measures of entropy from data using infinitely divisible kernels, 2015, and Yu et al., 2019 (several variables).

Backward elimination: of the filters R that are left in a layer, the one with the largest I(Z_k; Z_R without k) is
deleted, until one is left. Z_k are the activations of filter k; the entropies are matrix-based Renyi entropies in bits,
averaged over batches of images. Layers are ranked independently, on the dense network. The score is the order of
deletion; a plan keeps the last channels of each order, and the number of channels kept comes from the request.

Files:
    method.py: the method: what is read, how an order is found, how orders become a plan.
    options.py: its keys in a recipe, and the released program's names for its estimators.

The entropies, kernels and the elimination themselves are in ``dist_prune.pruning.information``.
"""

from dist_prune.methods.entropy.method import Entropy

__all__ = ["Entropy"]
