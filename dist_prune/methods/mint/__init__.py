"""MINT masks blocks of weights whose conditional mutual information is small.

Ganesh, Corso, Yasaei Sekeh: MINT: deep network compression via mutual information-based neuron trimming, ICPR 2020.
The estimator: Yasaei Sekeh, Hero: Geometric estimation of multivariate dependency, Entropy 2019.

The score of a block is I(X; Y | Z): X are the activations of a group of filters of a layer (the child), Y those of a
group of channels that feed it (the parent), Z those of the parent's other channels. A plan cuts the blocks whose score
is at or below a quantile ``p`` of all scores, within a cap per layer. With a target or a keep ratio it removes whole
channels by their summed scores instead; that form is not the paper's.

Files:
    method.py: the method: what is scored, how scores become a plan.
    options.py: its keys in a recipe.
    layer_pairs.py: pairs of child and parent, their groups, where their activations are read.
    mutual_information.py: the estimator of the conditional mutual information, and the images that it takes.
    spanning_tree.py: squared distances, nearest neighbours and minimum spanning trees, compiled.
    block_orders.py: orders that need no images, by weight or by chance, for comparison.
    thresholds.py: the quantile over all layers and the cap of one.
    dead_channels.py: channels that the cut blocks leave without use.
    quirks.py: departures of the released program.
"""

from dist_prune.methods.mint.method import Mint

__all__ = ["Mint"]
