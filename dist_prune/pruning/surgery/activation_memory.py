"""Peak of activations in a forward pass: measured by the lifetimes of tensors, and by arithmetic on widths.

A moment is what is alive during one operation: the image, the operation's inputs and outputs, and what later operations
read. Which tensors are alive does not depend on widths, and each tensor is as large as its channels are many. So the
bytes of a moment are linear in the channels that groups keep, and the peak is the largest moment.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_prune.errors import PruneError
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.network_output import copy_with
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.surgeon import apply_plan

KEPT = 16  # sets of removed blocks whose moments are kept


class _LiveBytes(TorchDispatchMode):
    """Records the bytes of live activations after each operation."""

    def __init__(self, model: nn.Module, inputs: Tensor):
        super().__init__()
        weights = [*model.parameters(), *model.buffers()]
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.moments: list[int] = []
        self._add(inputs)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights and storage._cdata not in self.live:
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.moments.append(sum(size for _, size in self.live.values()))
        return outputs


def measure_moments(model: nn.Module, images: Tensor) -> list[int]:
    """Bytes of live activations during each operation of a forward pass, without gradients, in evaluation mode.

    Args:
        model: a bare network; not changed.
        images: (n, C, H, W) on its device; counted, because its caller holds it.

    Returns:
        Bytes in the order of the operations. Weights and the kernels' own scratch memory are not counted.
    """
    with evaluation_mode(model), torch.no_grad(), _LiveBytes(model, images) as live:
        model(images)
    return live.moments


def measure_peak(model: nn.Module, images: Tensor) -> int:
    """The largest of ``measure_moments``, in bytes."""
    return max(measure_moments(model, images), default=0)


class ActivationMemory:
    """The peak of activations of a traced network, counted for any widths; implements ``groups.MemoryCount``.

    Nothing runs before the first count: then the network runs once for each free group on a blank image, on the CPU and
    with weights of zero, because sizes depend on shapes alone. (The meta device has other outputs of batch norms.)

    Args:
        model: the bare network that was traced; a copy of its shapes is kept.
        graph: its dependency graph.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph):
        self.dtype = next(model.parameters()).dtype
        self.model = copy_with(model, lambda tensor: tensor.to("meta")).to("meta")
        self.graph = graph
        self._known: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}

    def peak(self, kept: Mapping[str, int]) -> int:
        """Count the peak for one image.

        Args:
            kept: group -> number of kept channels; groups that are absent keep all. The key of a block with 0: it is
                gone.

        Raises:
            PruneError: the network cannot be counted.
        """
        base, each = self._moments_without(tuple(sorted(b.path for b in self.graph.blocks if kept.get(b.key) == 0)))
        gone = [group.width - kept.get(group.name, group.width) for group in self.graph.free]
        return int((base - each @ np.array(gone, dtype=np.int64)).max())

    def _moments_without(self, blocks: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The moments of the network without some residual blocks; those last asked for are kept."""
        if blocks not in self._known:
            self._known = {**dict(list(self._known.items())[-KEPT:]), blocks: self._moments(blocks)}
        return self._known[blocks]

    def _moments(self, blocks: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(m,) bytes of the moments of the whole network, (m, G) bytes that one channel of each group adds to them."""
        free = self.graph.free
        base = self._run({}, blocks)
        cut = [self._run({g.name: (0,)}, blocks) if g.width > 1 else base for g in free]
        if any(len(moments) != len(base) for moments in cut):
            raise PruneError("target.memory: the operations of this network depend on its widths")
        each = np.stack([base - moments for moments in cut], 1) if cut else np.zeros((len(base), 0), dtype=np.int64)
        halves = {g.name: tuple(range(g.width // 2)) for g in free if g.width > 1}
        gone = np.array([len(halves.get(g.name, ())) for g in free], dtype=np.int64)
        if not np.array_equal(self._run(halves, blocks), base - each @ gone):
            raise PruneError("target.memory: some tensors of this network do not grow in proportion to its channels")
        rows = np.unique(np.concatenate([base[:, None], each], 1), axis=0)
        return rows[:, 0], rows[:, 1:]

    def _run(self, off: Mapping[str, tuple[int, ...]], blocks: tuple[str, ...]) -> np.ndarray:
        small = copy.deepcopy(self.model).to_empty(device="cpu")
        widths = {group.name: group.width for group in self.graph.groups}
        try:
            with torch.no_grad():
                for tensor in (*small.parameters(), *small.buffers()):
                    tensor.zero_()
            apply_plan(small, self.graph, Plan(off, widths, blocks_removed=blocks))
            moments = measure_moments(small, torch.zeros(1, *self.graph.example, dtype=self.dtype))
        except PruneError:
            raise
        except Exception as error:  # an operation that needs values, of the network's own forward
            first = (str(error).splitlines() or [""])[0][:200]
            raise PruneError(
                f"target.memory: the network does not run on a blank image ({type(error).__name__}: {first}), so its "
                "memory cannot be counted. Choose another target"
            ) from error
        return np.array(moments, dtype=np.int64)
