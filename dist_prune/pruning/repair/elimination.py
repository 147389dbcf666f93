"""What the outputs of repaired layers lose with each channel: exact backward elimination by rank-k updates.

A layer with weights W (D, O) reads x with the covariance S (D, D). Without the columns c of a channel, the best other
weights leave the mean square error

    tr(W_c' (A_cc)^-1 W_c),   A = (S + l I)^-1

(A_cc)^-1 is the Schur complement of the channel's columns: their covariance that the other columns do not explain.
Then the best weights are W - A_:c (A_cc)^-1 W_c, and A becomes A - A_:c (A_cc)^-1 A_c:. So the next channel is judged
with the repair of all earlier ones, and the losses add up to the error of the whole cut.

Only the blocks A_cc are needed at every step. Updates of the rest wait, and are made many at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENDING = 64  # columns of updates that are kept apart before one product takes them into the inverse


@dataclass
class Reader:
    """A layer that reads the channels of a group.

    Attributes:
        covariance: (D, D) float64 of the columns that it reads.
        weight: (D, O) float64.
        columns: (C, k) int64, the columns of each channel.
        ridge: relative to the mean variance of the columns.
    """

    covariance: Tensor
    weight: Tensor
    columns: Tensor
    ridge: float = 1e-4

    def __post_init__(self):
        scale = float(self.covariance.diagonal().mean())
        size = len(self.covariance)
        ridge = torch.eye(size, dtype=torch.float64, device=self.covariance.device) * (self.ridge * scale or 1e-30)
        self.energy = float(((self.covariance @ self.weight) * self.weight).sum()) or 1.0
        self._inverse = torch.linalg.inv(self.covariance + ridge)  # less what is pending
        self._pending: list[tuple[Tensor, Tensor]] = []  # (D, k) pairs U, V: the inverse loses U V'
        self.blocks = self._inverse[self.columns[:, :, None], self.columns[:, None, :]]  # (C, k, k) of the inverse
        self.weight = self.weight.clone()

    @property
    def inverse(self) -> Tensor:
        """(D, D) inverse covariance of the channels that are left; zero, up to rounding, at the others."""
        if self._pending:
            left, right = (torch.cat(tables, 1) for tables in zip(*self._pending, strict=True))
            self._inverse -= left @ right.T
            self._pending = []
        return self._inverse

    def losses(self, channels: Tensor) -> Tensor:
        """The shares of the layer's output variance that are lost without one channel each.

        Args:
            channels: (m,) int64.

        Returns:
            (m,) float64.
        """
        own, blocks = self.weight[self.columns[channels]], self.blocks[channels]
        if self.columns.shape[1] == 1:
            return own.square().sum((1, 2)) / blocks[:, 0, 0] / self.energy
        products = own @ own.transpose(1, 2)
        return torch.linalg.solve(blocks, products).diagonal(dim1=1, dim2=2).sum(1) / self.energy

    def remove(self, channel: int) -> None:
        """Take a channel away and repair the weights of the others."""
        columns = self.columns[channel]
        across = self._inverse[:, columns]
        for left, right in self._pending:
            across = across - left @ right[columns].T
        scaled = torch.linalg.solve(across[columns], across.T).T
        self.weight -= scaled @ self.weight[columns]
        self.weight[columns] = 0
        self.blocks -= across[self.columns] @ scaled[self.columns].transpose(1, 2)
        self._pending.append((across, scaled))
        if len(self._pending) * len(columns) >= PENDING:
            _ = self.inverse


def backward_elimination(readers: Sequence[Reader], width: int) -> Tensor:
    """Remove channels one after another, each time the one whose loss is the smallest over all readers.

    Args:
        readers: the layers that read the group.
        width: channels of the group, C.

    Returns:
        (C,) float64: the loss of each channel when it was removed, or the largest loss before it, so that the order
        of the values is the order of removal. Of equal losses the smaller index goes first.
    """
    worth = torch.zeros(width, dtype=torch.float64)
    remaining, floor = list(range(width)), 0.0
    while remaining:
        left = torch.tensor(remaining)
        losses = torch.zeros(len(remaining), dtype=torch.float64)
        for reader in readers:
            losses += reader.losses(left.to(reader.weight.device)).cpu()
        best = int(losses.argmin())
        channel = remaining.pop(best)
        floor = max(floor * (1 + 1e-12) + 1e-300, float(losses[best]))
        worth[channel] = floor
        for reader in readers:
            reader.remove(channel)
    return worth
