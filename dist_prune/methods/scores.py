"""The scores of a network with the method that made them."""

from collections.abc import Mapping

from torch import Tensor

from dist_prune.methods.base import Method


class Scores(dict[str, Tensor]):
    """Named tensors on the CPU that ``select`` reads, with the method that made them.

    Attributes:
        method: the method and its options.
    """

    def __init__(self, tensors: Mapping[str, Tensor], method: Method):
        super().__init__(tensors)
        self.method = method
