"""A network in two parts: ``head`` up to the first of some layers, ``tail`` from there to the logits.

What lies before the first gated layer does not depend on the gate. The head runs once and the tail as often as asked,
on as many copies of the images as asked: torch.fx finds the cut in any network that it can trace. Other networks run
as one, every time: the same numbers, later.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_prune.pruning.eval_mode import evaluation_mode


class _Tracer(fx.Tracer):
    """Every layer that can be gated stays one step, whatever package its class comes from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


def fx_steps(model: nn.Module) -> fx.GraphModule | None:
    """The steps of a network in evaluation mode (its modules are shared, not copied); None where fx cannot follow."""
    try:
        with evaluation_mode(model):
            return fx.GraphModule(model, _Tracer().trace(model))
    except Exception:  # control flow on values, strange arguments: fx raises whatever it stumbled over
        return None


class SplitForward:
    """A network in two parts: ``head`` up to the first of some layers, ``tail`` from there to the logits.

    Attributes:
        whole: there is no cut (not traceable, or something other than a batch crosses it): ``head`` hands the images
            on.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule | None, layers: Iterable[str]):
        self.model, self.unsplit = model, graph is None
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
        """(n, C, H, W) -> what the tail needs, each with the batch in front."""
        if self.unsplit:
            return (images,)
        self._steps.env, self._steps.args_iter = {}, iter([images])
        for node in self._head:
            self._steps.env[node] = self._steps.run_node(node)
        live = tuple(self._steps.env[node] for node in self._live)
        self._steps.env = {}
        return live

    def tail(self, live: Sequence[Tensor]) -> Tensor:
        """What ``head`` gave, or copies of it behind one another -> logits."""
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
        """Make the network whole again where its parts do not give the logits that it gives, once and in two copies."""
        if self.unsplit:
            return
        wanted = self.model(images)
        try:
            live = self.head(images)
            if not all(isinstance(t, Tensor) and len(t) == len(images) for t in live):
                raise ValueError("something other than a batch crosses the cut")
            twice = self.tail([torch.cat([t, t]) for t in live])
            same = torch.allclose(twice, torch.cat([wanted, wanted]), rtol=1e-3, atol=1e-4)
        except Exception:  # whatever the network's own steps say to a batch of another size
            same = False
        self.unsplit = not same


def repeat_batch(live: Sequence[Tensor], count: int) -> list[Tensor]:
    """``count`` copies of a batch behind one another (sample-major: copy by copy). New memory, also for one."""
    return [t.repeat(count, *[1] * (t.dim() - 1)) for t in live]
