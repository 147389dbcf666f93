"""Switches: the channels of groups times numbers while a network runs, and the network behind the first of them.

What lies before the first switch does not depend on it. ``Rest`` runs it once and the part behind it as often as
asked, on as many copies of the images as asked: torch.fx finds the cut in whatever network it can trace. Others run
whole, every time: the same numbers, later.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from dist_prune.pruning.channels import Channels
from dist_prune.pruning.combine import placed
from dist_prune.pruning.probe import first_input, quiet, with_first_input

Where = Literal["consumed", "output"]
Values = Callable[[], Tensor]  # (C,), or (N, C): of each image


@dataclass(frozen=True)
class Place:
    """Where a group's channels pass in one layer: position p of its input (or output) is channel ``slot[p]``.

    Positions of other groups have slot C. ``plain``: the positions are the channels, in order.
    """

    layer: str
    side: Literal["in", "out"]
    slot: Tensor
    plain: bool
    last: bool  # channels are the last axis (linear layers)


def places(channels: Channels, group: str, where: Where = "consumed") -> list[Place]:
    """The places that switch a group.

    ``consumed``: the inputs of the convolutions and linear layers that read it, behind every norm, activation, pool and
    addition: a channel times 0 is a removed one. ``output``: the raw outputs of the layers that make it; a norm behind
        them
    still adds its shift.
    """
    found, width = [], channels.group(group).width
    side: Literal["in", "out"] = "in" if where == "consumed" else "out"
    slots: dict[str, Tensor] = {}
    for coupling in channels.group(group).couplings:
        layer = channels.layers[coupling.layer]
        if coupling.side != side or layer.kind not in ("conv", "linear") or layer.depthwise:
            continue
        count = layer.width_in if side == "in" else layer.width_out
        slot = slots.setdefault(layer.name, torch.full((count,), width))
        slot[torch.tensor(coupling.index)] = torch.tensor(coupling.channel)
    for name, slot in slots.items():
        plain = torch.equal(slot, torch.arange(width))
        found.append(Place(name, side, slot, plain, channels.layers[name].kind == "linear"))
    return found


@contextmanager
def switched(model: nn.Module, switches: Sequence[tuple[Sequence[Place], Values]]) -> Iterator[None]:
    """Run ``model`` with the channels at these places times the values of their switch."""
    handles = []
    try:
        for spots, values in switches:
            for place in spots:
                module = model.get_submodule(place.layer)

                def before(
                    _m: nn.Module, args: Any, kwargs: Any, place: Place = place, values: Values = values
                ) -> tuple[Any, Any]:
                    return with_first_input(args, kwargs, _times(first_input(args, kwargs), values(), place))

                def after(_m: nn.Module, _i: Any, out: Tensor, place: Place = place, values: Values = values) -> Tensor:
                    return _times(out, values(), place)

                if place.side == "in":
                    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _times(x: Tensor, values: Tensor, place: Place) -> Tensor:
    values = values.to(x.device, x.dtype)
    if not place.plain:
        values = torch.cat([values, values.new_ones((*values.shape[:-1], 1))], -1)[..., placed(place.slot, x)]
    between = [1] * (x.dim() - 2)
    n = values.shape[0] if values.dim() == 2 else 1
    return x * (values.view(n, *between, -1) if place.last else values.view(n, -1, *between))


class _Tracer(fx.Tracer):
    """Every layer that a switch can sit on stays one step, whatever package its class comes from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.GraphModule | None:
    """The steps of a network in evaluation mode (its modules are shared, not copied); None where fx cannot follow."""
    try:
        with quiet(model):
            return fx.GraphModule(model, _Tracer().trace(model))
    except Exception:  # control flow on values, strange arguments: fx raises whatever it stumbled over
        return None


class Rest:
    """A network in two parts: ``head`` up to the first of some layers, ``tail`` from there to the logits.

    Attributes:
        whole: there is no cut (not traceable, or something other than a batch crosses it): ``head`` hands the images
            on.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule | None, layers: Iterable[str]):
        self.model, self.whole = model, graph is None
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
        if self.whole:
            return (images,)
        self._steps.env, self._steps.args_iter = {}, iter([images])
        for node in self._head:
            self._steps.env[node] = self._steps.run_node(node)
        live = tuple(self._steps.env[node] for node in self._live)
        self._steps.env = {}
        return live

    def tail(self, live: Sequence[Tensor]) -> Tensor:
        """What ``head`` gave, or copies of it behind one another -> logits."""
        if self.whole:
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
    def prove(self, images: Tensor) -> None:
        """Make the network whole again where its parts do not give the logits that it gives, once and in two copies."""
        if self.whole:
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
        self.whole = not same


def copies(live: Sequence[Tensor], count: int) -> list[Tensor]:
    """``count`` copies of a batch behind one another (sample-major: copy by copy). New memory, also for one."""
    return [t.repeat(count, *[1] * (t.dim() - 1)) for t in live]
