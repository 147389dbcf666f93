"""The dense and the pruned network side by side, from layer to layer: the inputs and the errors of each layer.

torch.fx cuts both networks into steps. The tensors that cross the present cut are held for every micro-batch, if they
fit into the memory that is allowed; then no step runs twice. Otherwise the cut stays where it was, and the steps from
there are repeated for the next layer. Networks that fx cannot trace run whole for every layer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_prune.pruning.hooks.split_forward import fx_steps
from dist_prune.pruning.module_calls import first_input
from dist_prune.pruning.repair.repaired_layers import RepairedLayer

ADDITIONS, PRODUCTS = {"add", "add_", "iadd"}, {"mul", "mul_", "imul"}
DROPPED = {"DropPath", "StochasticDepth"}  # classes of timm, transformers and torchvision: nothing in evaluation mode
SCALES = {"LayerScale", "LayerScale2d"}  # of timm: a factor ``gamma`` for each channel
Values = dict[int, Any]  # number of a step -> its value


class PairedWalk:
    """Runs both networks over the micro-batches of one rank, in the order of the repaired layers.

    Args:
        dense: the dense network; both are in evaluation mode while pairs are made.
        small: the pruned network, whose weights change between two layers.
        images: the micro-batches, each (n, C, H, W) on the device.
        layers: in the order in which they run.
        memory: bytes of tensors that may be held between two layers.
    """

    def __init__(
        self, dense: nn.Module, small: nn.Module, images: Sequence[Tensor], layers: Sequence[RepairedLayer], memory: int
    ):
        self.dense, self.small, self.memory = dense, small, memory
        self.steps = _paired_steps(dense, small)
        self.held: list[tuple[Values, Values]] = []
        self.images = images
        self.cut = 0
        self.whole = self.steps is None
        if self.steps is not None:
            order = {node.target: i for i, node in enumerate(self.steps.nodes) if node.op == "call_module"}
            self.whole = any(layer.name not in order for layer in layers)
            self.order = order
        if not self.whole:
            start = self.steps.nodes[0] if self.steps else None
            assert start is not None
            self.held = [({0: image}, {0: image}) for image in images]

    def pairs(self, layer: RepairedLayer) -> Iterator[tuple[Tensor, Tensor]]:
        """The layer's inputs in the pruned network and the errors of its outputs, for each micro-batch.

        Yields:
            x as the layer gets it, and the error: dense minus pruned output. Before an addition the error of the other
            summand is added, so that the sum is repaired.
        """
        if self.whole:
            yield from (self._whole(layer, images) for images in self.images)
            return
        assert self.steps is not None
        target = self.order[layer.name]
        moves = self._moves(target)
        other, factor = self.steps.other_summand(target, layer.norm)
        scale = layer.output_scale(self.small)
        if factor is not None:
            scale = factor if scale is None else scale * factor
        kept_outputs = layer.kept_outputs(self.dense)
        for number in range(len(self.held)):
            values = self.held[number]
            with torch.no_grad():
                dense, small = (
                    self.steps.run(which, values[which], self.cut, target, copy=not moves) for which in (0, 1)
                )
                node = self.steps.nodes[target]
                source = self.steps.number[node.all_input_nodes[0]]
                x, error = small[source], None
                wanted = kept_outputs(dense[source]) if kept_outputs else self.steps.call(0, dense, target)
                error = wanted - self.steps.call(1, small, target)
                if other is not None:
                    summands = [
                        values[other] if other in values else self.steps.call(which, values, other)
                        for which, values in enumerate((dense, small))
                    ]
                    axis = -1 if isinstance(self.small.get_submodule(layer.name), nn.Linear) else 1
                    error = _with_other(error, summands[0], summands[1], layer, scale, axis)
            if moves:
                live = self.steps.live(target)
                self.held[number] = tuple({i: v for i, v in side.items() if i in live} for side in (dense, small))  # type: ignore[assignment]
            yield x, error
        if moves:
            self.cut = target

    def _moves(self, target: int) -> bool:
        """Whether the tensors that cross the cut before a step may be held for all micro-batches."""
        if not self.held:
            return True
        assert self.steps is not None
        largest = max(range(len(self.held)), key=lambda number: len(self.images[number]))
        with torch.no_grad():
            if target not in self.steps.sizes:
                images = self.images[largest][:1]
                self.steps.measure(images)
        images = sum(len(batch) for batch in self.images)
        return self.steps.sizes[target] * images <= self.memory

    def _whole(self, layer: RepairedLayer, images: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and errors of a layer from whole forward passes."""
        found: list[tuple[Tensor, Tensor]] = []
        for model in (self.dense, self.small):

            def hook(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                found.append((first_input(args, kwargs).clone(), output.clone()))
                raise _Done

            handle = model.get_submodule(layer.name).register_forward_hook(hook, with_kwargs=True)
            try:
                with torch.no_grad():
                    model(images)
            except _Done:
                pass
            finally:
                handle.remove()
        (_, wanted), (x, output) = found
        if layer.kept is not None:
            wanted = _outputs(wanted, layer.kept, self.dense.get_submodule(layer.name))
        return x, wanted - output


class _Done(Exception):
    """The layer that is asked for has run."""


class _Steps:
    """The steps of both networks; the same graph with other weights."""

    def __init__(self, dense: fx.GraphModule, small: fx.GraphModule):
        self.pair = [fx.Interpreter(graph, garbage_collect_values=False) for graph in (dense, small)]
        self.graphs = [list(graph.graph.nodes) for graph in (dense, small)]
        self.nodes = self.graphs[0]
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.numbers = [self.number, {node: i for i, node in enumerate(self.graphs[1])}]
        self.last = {i: max((self.number[user] for user in node.users), default=i) for i, node in enumerate(self.nodes)}
        self.sizes: dict[int, int] = {}

    def live(self, step: int) -> set[int]:
        """The numbers of the steps before ``step`` whose values are used from there on, without parameters."""
        return {i for i in range(step) if self.last[i] >= step and self.nodes[i].op != "get_attr"}

    def run(self, which: int, held: Values, start: int, stop: int, copy: bool) -> Values:
        """The values of the steps before ``stop`` that are used from there on."""
        values = {i: v.clone() if copy and isinstance(v, Tensor) and i else v for i, v in held.items()}
        for i in range(start, stop):
            if i not in values:
                values[i] = self.call(which, values, i)
                for source in self.nodes[i].all_input_nodes:
                    number = self.number[source]
                    if self.last[number] <= i and number in values:
                        del values[number]
        return values

    def call(self, which: int, values: Values, step: int) -> Any:
        """The value of one step, from those that it reads."""
        interpreter, nodes = self.pair[which], self.graphs[which]
        node = nodes[step]
        if node.op == "placeholder" and step:  # an input beside the images has its default
            return node.args[0]
        env: dict[fx.Node, Any] = {}
        for source in node.all_input_nodes:
            number = self.numbers[which][source]
            env[source] = values[number] if number in values else self.call(which, values, number)
        interpreter.env = env
        out = interpreter.run_node(node)
        interpreter.env = {}
        return out

    def measure(self, images: Tensor) -> None:
        """Note the bytes per image that cross the cut before each step, of both networks together."""
        sizes = {i: 0 for i in range(len(self.nodes))}
        for which in (0, 1):
            values: Values = {0: images}
            nbytes = {0: images.nbytes}
            for i in range(1, len(self.nodes) - 1):
                if self.nodes[i].op == "get_attr":
                    continue
                values[i] = self.call(which, values, i)
                nbytes[i] = values[i].nbytes if isinstance(values[i], Tensor) else 0
                for source in self.nodes[i].all_input_nodes:
                    if self.last[self.number[source]] <= i:
                        values.pop(self.number[source], None)
            for step in sizes:
                sizes[step] += sum(nbytes.get(i, 0) for i in self.live(step))
        self.sizes = sizes

    def other_summand(self, step: int, norm: str) -> tuple[int | None, Tensor | None]:
        """The step that is added to a layer's output, and what the output is multiplied by before that.

        Between the layer and the addition may be its batch norm, modules that do nothing in evaluation mode, and
        products with constants: layer scales. A shortcut may be computed behind the layer, of values that are there
        before it.

        Args:
            step: of the layer.
            norm: module path of the batch norm that reads its outputs, or empty.

        Returns:
            The step, None if there is no addition; and the (o,) product of the pruned network's constants, or None.
        """
        node, factor, norm_left = self.nodes[step], None, norm
        while len(node.users) == 1:
            user = next(iter(node.users))
            if _name(user) in ADDITIONS:
                others = [source for source in user.all_input_nodes if not self._reads(source, self.nodes[step])]
                return (self.number[others[0]], factor) if len(others) == 1 and not norm_left else (None, None)
            if norm_left and user.op == "call_module" and user.target == norm_left:
                norm_left = ""
            elif not _is_identity(self.pair[0].module, user):
                own = self._factor(user, node)
                if own is None:
                    break
                factor = own if factor is None else factor * own
            node = user
        return None, None

    def _factor(self, user: fx.Node, node: fx.Node) -> Tensor | None:
        """(o,) numbers by which a step of the pruned network multiplies another one's value; None: it does not."""
        if user.op == "call_module" and type(module := self._small(user)).__name__ in SCALES:
            return module.gamma.detach().flatten()
        if _name(user) not in PRODUCTS:
            return None
        others = [source for source in user.all_input_nodes if source is not node]
        if len(others) != 1 or self._reads(others[0], self.nodes[0]):
            return None
        with torch.no_grad():
            value = self.call(1, {}, self.number[others[0]])
        return value.flatten() if isinstance(value, Tensor) else None

    def _small(self, node: fx.Node) -> Any:
        return self.pair[1].module.get_submodule(str(node.target))

    def _reads(self, node: fx.Node, early: fx.Node) -> bool:
        """Whether a node's value depends on that of another one."""
        waiting, seen = [node], set[fx.Node]()
        while waiting:
            own = waiting.pop()
            if own is early:
                return True
            fresh = [
                source
                for source in own.all_input_nodes
                if source not in seen and self.number[source] >= self.number[early]
            ]
            seen.update(fresh)
            waiting += fresh
        return False


def _is_identity(model: nn.Module, node: fx.Node) -> bool:
    """Whether a step does nothing in evaluation mode."""
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return isinstance(module, nn.Identity | nn.Dropout) or type(module).__name__ in DROPPED


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _paired_steps(dense: nn.Module, small: nn.Module) -> _Steps | None:
    graphs = [fx_steps(model) for model in (dense, small)]
    if graphs[0] is None or graphs[1] is None:
        return None
    names = [[(node.op, str(node.target)) for node in graph.graph.nodes] for graph in graphs if graph is not None]
    inputs = [node for node in graphs[0].graph.nodes if node.op == "placeholder"]
    if names[0] != names[1] or names[0][0][0] != "placeholder" or not all(node.args for node in inputs[1:]):
        return None
    return _Steps(graphs[0], graphs[1])


def _outputs(value: Tensor, kept: Tensor, module: nn.Module) -> Tensor:
    axis = -1 if isinstance(module, nn.Linear) else 1
    return value.index_select(axis, kept.to(value.device))


def _with_other(error: Tensor, dense: Any, small: Any, layer: RepairedLayer, scale: Tensor | None, axis: int) -> Tensor:
    """The error plus that of the other summand, in units of the layer's output; ``axis``: of the channels."""
    if not isinstance(dense, Tensor) or not isinstance(small, Tensor) or small.shape != error.shape:
        return error
    if layer.kept is not None:
        dense = dense.index_select(axis, layer.kept.to(dense.device))
    if dense.shape != error.shape:
        return error
    difference = dense - small
    if scale is not None:
        usable = scale.abs() > 1e-3 * scale.abs().max()
        inverse = torch.where(usable, 1 / torch.where(usable, scale, torch.ones_like(scale)), torch.zeros_like(scale))
        difference = difference * (inverse if axis == -1 else inverse.view(-1, *[1] * (error.dim() - 2)))
    return error + difference
