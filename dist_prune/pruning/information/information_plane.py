"""Information plane of an order: information of the kept filters about images and labels, for each number of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_prune.pruning.information import bandwidth
from dist_prune.pruning.information.renyi import distances, gaussian_kernel, kernel_entropy, label_kernel

COLUMNS = ("ixz", "izy", "total_correlation", "hx", "hy")
GRID = bandwidth.BandwidthGrid(coarse=True)


@dataclass(frozen=True)
class InformationPlane:
    """How the curves are estimated (entropy specification, section 6).

    Kernels of images and labels have fixed bandwidths. The kernel of the kept filters is aligned to that of the labels
    in each batch and smoothed in the order of the batches. Kernels of single filters follow ``sigma_method``.

    Attributes:
        batch: images whose entropies are taken together; an incomplete last batch is dropped.
        alpha: order of the entropy.
        sigma_method: ``fix`` uses the scaled rule, ``all`` aligns to the kernel of the whole layer, ``remain`` aligns
            to that of the kept filters (section 3.4).
        sigma_x: bandwidth of the kernel of the images.
        sigma_y: bandwidth of the label kernel.
    """

    batch: int = 100
    alpha: float = 1.01
    sigma_method: Literal["fix", "all", "remain"] = "all"
    sigma_x: float = 8.0
    sigma_y: float = 0.1

    def curve(
        self, images: Tensor, labels: Tensor, maps: Tensor, order: Sequence[int], counts: Iterable[int]
    ) -> Tensor:
        """Estimate the curves over the number of kept filters. Z is the activation of the kept filters.

        Args:
            images: (N, D) flattened images X.
            labels: (N,) int64 class numbers Y.
            maps: (N, K, d) activations of the group.
            order: order of removal; its last m channels are kept.
            counts: the numbers m of kept filters, in any order.

        Returns:
            (counts, 5) float64 in bits, mean over batches: I(X;Z), I(Z;Y), total correlation, H(X), H(Y).
        """
        n = min(self.batch, len(labels))
        batches = [slice(i, i + n) for i in range(0, len(labels) - n + 1, n)]
        image_kernels = [gaussian_kernel(distances(images[p, None].double())[0], self.sigma_x) for p in batches]
        label_kernels = [label_kernel(labels[p], self.sigma_y) for p in batches]
        squared = [distances(maps[p].double()) for p in batches]
        d = maps.shape[2]
        hx, hy = (
            [float(kernel_entropy(k, n, self.alpha)) for k in kernels] for kernels in (image_kernels, label_kernels)
        )
        all_channels, rows = list(range(len(order))), []
        exponents: list[Tensor] = []
        singles: list[Tensor] = []
        for count in counts:
            kept = list(order[len(order) - count :])
            kept_squared = [table[kept].sum(0) for table in squared]
            bandwidths = [
                bandwidth.align_bandwidths(w[None], y, n, t, GRID)
                for t, (w, y) in enumerate(zip(kept_squared, label_kernels, strict=True))
            ]
            sigma = float(bandwidth.smooth_over_batches(bandwidths)[0])
            if not exponents or self.sigma_method == "remain":
                members = kept if self.sigma_method == "remain" else all_channels
                exponents = self._exponents([table[members] for table in squared], n, d)
                singles = [kernel_entropy(torch.exp(-u), n, self.alpha) for u in exponents]
            index = range(len(kept)) if self.sigma_method == "remain" else kept
            sums = torch.zeros(len(COLUMNS), dtype=torch.float64)
            for t in range(len(batches)):
                z = gaussian_kernel(kept_squared[t], sigma, halved=False)
                hz = float(kernel_entropy(z, n, self.alpha))
                joints = [
                    float(kernel_entropy(z * other, n, self.alpha)) for other in (image_kernels[t], label_kernels[t])
                ]
                product = torch.exp(-exponents[t][list(index)].sum(0))
                tc = float(singles[t][list(index)].sum()) - float(kernel_entropy(product, n, self.alpha))
                row = [hx[t] + hz - joints[0], hz + hy[t] - joints[1], tc, hx[t], hy[t]]
                sums += torch.tensor(row, dtype=torch.float64)
            rows.append(sums / len(batches))
        return torch.stack(rows)

    def _exponents(self, squared: Sequence[Tensor], n: int, d: int) -> list[Tensor]:
        """(V, pairs) exponents of the kernels of single filters, for each batch."""
        if self.sigma_method == "fix":
            return [table / (2 * bandwidth.scaled_rule(n, d) ** 2) for table in squared]
        reference_bandwidth = bandwidth.scaled_rule(n, d * len(squared[0]))
        references = [gaussian_kernel(table.sum(0), reference_bandwidth) for table in squared]
        sigmas = bandwidth.smooth_over_batches(
            [
                bandwidth.align_bandwidths(table, a, n, t, GRID)
                for t, (table, a) in enumerate(zip(squared, references, strict=True))
            ]
        )
        return [table / sigmas[:, None] ** 2 for table in squared]
