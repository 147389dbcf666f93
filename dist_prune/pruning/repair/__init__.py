"""Repair after the cut: new weights of the layers that are left, in closed form, from images without labels.

For one layer let x be its inputs in the pruned network, one row for each position of each image (the patch that a
convolution reads), and r the error of its outputs: the dense network's minus the pruned network's. The change D of
its weights and b of its bias minimise

    sum over rows |r - x D - b|^2 + l n |D|^2,    so    D = (Cov(x, x) + l I)^-1 Cov(x, r),   b = mean(r) - mean(x) D

The ridge l pulls towards the weights as they are. Without an error nothing changes. Layers are repaired in the order
in which they run; each sees what the repaired layers before it give.
"""
