"""A network in two parts: ``head`` up to the first of some layers, ``tail`` from there to the logits.

The layers before the first gate do not depend on the gate. The head runs once; the tail runs as often as needed, on
several copies of the batch at once. torch.fx finds the split in any network that it can trace. Other networks run
unsplit every time, with the same results.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.stream_layers import norm_form


class _Tracer(fx.Tracer):
    """A tracer that keeps every layer that can be gated as one step, whatever package its class comes from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
        return isinstance(m, layers) or norm_form(m) is not None or super().is_leaf_module(m, module_qualified_name)


def fx_steps(model: nn.Module) -> fx.GraphModule | None:
    """Trace a network in evaluation mode by torch.fx.

    Returns:
        The steps of the network, which shares its modules with ``model``; None if fx cannot trace it.
    """
    try:
        with evaluation_mode(model):
            return fx.GraphModule(model, _Tracer().trace(model))
    except Exception:  # control flow on values, strange arguments: fx passes on any error of the network
        return None


class SplitForward:
    """A network in two parts: ``head`` up to the first of some layers, ``tail`` from there to the logits.

    Args:
        model: a bare network.
        graph: its ``fx_steps``, or None.
        layers: module paths; the split is before the first of them that runs.

    Attributes:
        unsplit: True if there is no split, because the network cannot be traced or something other than a batch crosses
            the split. Then ``head`` returns the images and ``tail`` runs the network.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule | None, layers: Iterable[str]):
        self.model = model
        self.unsplit = graph is None
        if graph is None:
            return
        wanted, nodes = set(layers), list(graph.graph.nodes)
        cut = next(i for i, node in enumerate(nodes) if node.op == "call_module" and node.target in wanted)
        used = {before for node in nodes[cut:] for before in node.all_input_nodes}
        states = [node for node in nodes[:cut] if node.op == "get_attr" and node in used]
        self._live = [node for node in nodes[:cut] if node in used and node.op != "get_attr"]
        self._head, self._tail = nodes[:cut], [*states, *nodes[cut:]]
        self._steps = fx.Interpreter(graph, garbage_collect_values=False)
        last = {before: node for node in self._tail for before in node.all_input_nodes}
        self._over: Mapping[fx.Node, list[fx.Node]] = {
            node: [before for before, user in last.items() if user is node] for node in self._tail
        }

    def head(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run images (n, C, H, W) through the head; return the tensors that the tail needs, each (n, ...)."""
        if self.unsplit:
            return (images,)
        self._steps.env, self._steps.args_iter = {}, iter([images])
        for node in self._head:
            self._steps.env[node] = self._steps.run_node(node)
        live = tuple(self._steps.env[node] for node in self._live)
        self._steps.env = {}
        return live

    def tail(self, live: Sequence[Tensor]) -> Tensor:
        """Compute logits from the outputs of ``head``, or from several copies of them (``repeat_batch``)."""
        if self.unsplit:
            return self.model(live[0])
        self._steps.env = dict(zip(self._live, live, strict=True))
        out: Any = None
        for node in self._tail:
            out = self._steps.env[node] = self._steps.run_node(node)
            for done in self._over[node]:
                self._steps.env.pop(done, None)
        self._steps.env = {}
        return out

    @torch.no_grad()
    def verify(self, images: Tensor) -> None:
        """Set ``unsplit`` if head and tail do not reproduce the network's logits on two copies of a batch.

        Args:
            images: (n, C, H, W) on the network's device.
        """
        if self.unsplit:
            return
        expected = self.model(images)
        try:
            live = self.head(images)
            if not all(isinstance(t, Tensor) and len(t) == len(images) for t in live):
                raise ValueError("something other than a batch crosses the split")
            twice = self.tail([torch.cat([t, t]) for t in live])
            same = torch.allclose(twice, torch.cat([expected, expected]), rtol=1e-3, atol=1e-4)
        except Exception:  # any error of the network's own steps on a batch of another size
            same = False
        self.unsplit = not same


def repeat_batch(live: Sequence[Tensor], count: int) -> list[Tensor]:
    """Concatenate ``count`` copies of a batch along the first axis, copy after copy, always in new memory."""
    return [t.repeat(count, *[1] * (t.dim() - 1)) for t in live]
