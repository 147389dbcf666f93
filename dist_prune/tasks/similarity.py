"""Comparison of features of images: linear CKA, and the classes of nearest neighbours."""

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al. 2018)
CHUNK = 1024  # queries that are compared with the gallery at once


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two networks: 1 for features that are equal up to rotation and scale.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.

    Args:
        first: (n, c) features of n images, float64.
        second: (n, d) features of the same images in the same order, float64.

    Returns:
        0 to 1; nan if the features of all images are equal in one of the networks, or not finite.
    """
    first, second = first - first.mean(0), second - second.mean(0)
    both = [(first, first), (second, second), (first, second)]
    # ||A^T B||^2 is the sum of (A A^T) * (B B^T): the smaller products are taken
    few = len(first) < max(first.shape[1], second.shape[1])
    if few:
        kernels = {id(features): features @ features.T for features in (first, second)}
        sizes = [float((kernels[id(a)] * kernels[id(b)]).sum()) for a, b in both]
    else:
        sizes = [float((a.T @ b).square().sum()) for a, b in both]
    return sizes[2] / (sizes[0] * sizes[1]) ** 0.5 if sizes[0] * sizes[1] > 0 else float("nan")


def neighbour_classes(queries: Tensor, gallery: Tensor, classes: Tensor, neighbours: int) -> Tensor:
    """The class that the nearest images of a gallery vote for, each vote weighted by exp(cosine similarity / 0.07).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018, section 3.4.

    Args:
        queries: (n, c) features, float64.
        gallery: (m, c) features, float64.
        classes: (m,) int64 class numbers of the gallery.
        neighbours: how many images vote; all of a smaller gallery.

    Returns:
        (n,) int64. Of classes with equal votes the lowest number, of images that are equally near the first.
    """
    gallery, count = functional.normalize(gallery), int(classes.max()) + 1
    found = []
    for part in functional.normalize(queries).split(CHUNK):
        near = (part @ gallery.T).sort(dim=1, descending=True, stable=True)
        values, places = near.values[:, :neighbours], near.indices[:, :neighbours]
        votes = torch.zeros(len(part), count, dtype=queries.dtype)
        found.append(votes.scatter_add_(1, classes[places], (values / TEMPERATURE).exp()).argmax(1))
    return torch.cat(found)
