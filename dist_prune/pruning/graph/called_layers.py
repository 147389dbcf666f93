"""Attention modules whose layers are called, and whose heads may be fewer than the width of their input allows.

Some classes multiply by a layer's weight without calling the layer, so that no hook sees it; some reshape their heads
to the width of the input, which is right for all heads only. ``call_layers`` gives such modules another class. Their
parameters, the names of these, and their outputs (to rounding) stay.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from dist_prune.pruning.graph.attention_forwards import FORWARDS, LATENT, MULTIHEAD
from dist_prune.pruning.graph.groups import Units


def path_of(kind: type) -> str:
    """``package.module.Class``; a class that ``call_layers`` gives has the path of the one before."""
    return f"{kind.__module__}.{kind.__qualname__}"


def rows_of_view(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of a view in the dense network; 0 if there is none of that name.

    Args:
        name: module path.
        shapes: name of a parameter of the dense network -> its shape.
    """
    path, _, leaf = name.rpartition(".")
    fused = shapes.get(f"{path}.qkv.weight") or shapes.get(f"{path}.in_proj_weight")
    return fused[0] // 3 * {"in_proj": 3, "qk": 2, "v": 1}.get(leaf, 0) if fused else 0


class LinearView(nn.Linear):
    """A linear layer whose weight and bias are parameters of another module: it can be called, and has none itself.

    Args:
        owner: the module with the parameters.
        weight: name of the weight, (out, in).
        bias: name of the bias, (out,).
    """

    def __init__(self, owner: nn.Module, weight: str, bias: str):
        nn.Module.__init__(self)
        self.__dict__["view"] = (owner, weight, bias)  # no submodule: the owner holds this one

    def __setattr__(self, name: str, value: Any) -> None:
        owner, weight, bias = self.__dict__.get("view", (None, "", ""))
        if name in ("weight", "bias"):
            setattr(owner, weight if name == "weight" else bias, value)
        elif name not in ("in_features", "out_features"):  # they follow from the weight
            super().__setattr__(name, value)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """(out, in), the owner's parameter."""
        owner, name, _ = self.__dict__["view"]
        return getattr(owner, name)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """(out,), the owner's parameter, or None."""
        owner, _, name = self.__dict__["view"]
        return getattr(owner, name)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Rows of the weight."""
        return self.weight.shape[0]

    def parameters(self, recurse: bool = True) -> Any:
        """The owner's parameters, so that a tracer knows them as a layer's."""
        return iter(tensor for tensor in (self.weight, self.bias) if tensor is not None)


class RowsView(LinearView):
    """The rows of queries with keys, or those of values, of a layer that makes all three.

    The attention module's ``query_key_rows`` says where the values begin.

    Args:
        module: the attention module.
        owner: the layer, or the attention module itself.
        weight: name of the weight.
        bias: name of the bias.
        keys: whether the rows are those of queries and keys.
    """

    def __init__(self, module: nn.Module, owner: nn.Module, weight: str, bias: str, keys: bool):
        super().__init__(owner, weight, bias)
        self.__dict__["part"] = (module, keys)
        self.detached = False  # a tracer follows images, and no slices of weights

    def _rows(self) -> slice:
        module, keys = self.__dict__["part"]
        return slice(0, module.query_key_rows) if keys else slice(module.query_key_rows, None)

    def _own(self, tensor: Any) -> Any:
        return None if tensor is None else (tensor.detach() if self.detached else tensor)[self._rows()]

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """(rows, in), a slice of the owner's parameter."""
        owner, name, _ = self.__dict__["view"]
        return self._own(getattr(owner, name))

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """(rows,), a slice of the owner's parameter, or None."""
        owner, _, name = self.__dict__["view"]
        return self._own(getattr(owner, name))

    def parameters(self, recurse: bool = True) -> Any:
        """The owner's parameters."""
        owner, weight, bias = self.__dict__["view"]
        return iter(tensor for tensor in (getattr(owner, weight), getattr(owner, bias)) if tensor is not None)

    def cut(self, side: str, positions: Iterable[int]) -> None:
        """Remove rows (``out``), or columns (``in``: of both views at once, when it is asked of queries and keys)."""
        owner, weight, bias = self.__dict__["view"]
        module, keys = self.__dict__["part"]
        if side == "in" and not keys:
            return
        first, gone = 0 if side == "in" else self._rows().start, set(positions)
        for name, axis in ((weight, 1 if side == "in" else 0), (bias, 0)):
            old = getattr(owner, name)
            if old is None or (side == "in" and name == bias):
                continue
            kept = torch.tensor([i for i in range(old.shape[axis]) if i - first not in gone], device=old.device)
            setattr(owner, name, nn.Parameter(old.data.index_select(axis, kept), old.requires_grad))
        if side == "out" and keys:
            module.query_key_rows -= len(gone)
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape


def _new(kind: type) -> Any:
    """An empty module of the class that stands for ``kind``, as unpickling and copying want it."""
    return object.__new__(_called_class(kind))


@cache
def _called_class(kind: type) -> type:
    """The class with a forward pass of ``FORWARDS`` that stands for ``kind``, and shares its path."""
    base = nn.Module if path_of(kind) == MULTIHEAD else kind  # torch-pruning has a way of its own with torch's class
    names: dict[str, Any] = {
        "forward": FORWARDS[path_of(kind)],
        "calls_layers": True,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": lambda self, _protocol: (_new, (kind,), self.__dict__),
    }
    return type(kind.__name__, (base,), names)


# classes whose own forward pass calls all layers, and takes any number of whole heads
_OPEN = ("timm.layers.attention.Attention", "timm.models.swin_transformer.WindowAttention")
# classes with one layer for queries, keys and values, whose heads can be narrowed
NARROWED = (*_OPEN, "timm.models.eva.EvaAttention", "timm.models.beit.Attention", MULTIHEAD)


def called(module: nn.Module) -> bool:
    """Whether a module calls its layers: of a class that always does, or since ``call_layers``."""
    path = path_of(type(module))
    return path not in FORWARDS or path in _OPEN or getattr(module, "calls_layers", False)


def call_layers(model: nn.Module, units: Units, only: Iterable[str] | None = None) -> None:
    """Let every attention module call its layers, in place; a module that does already stays as it is.

    Args:
        model: a bare network. Its parameters, their names and its outputs (to rounding) stay.
        units: ``earlier``: nothing is done; ``whole``: modules whose class does not call its layers get another class;
            ``head_width``: modules call one layer for queries with keys, and one for values.
        only: module paths; None: of all modules.
    """
    names = None if only is None else set(only)
    for name, module in list(model.named_modules()) if units != "earlier" else ():
        if (names is not None and name not in names) or not _known(module):
            continue
        narrow = units == "head_width" and _can_narrow(module)
        if not narrow and called(module):
            continue
        kind = type(module)
        if not getattr(module, "calls_layers", False):
            module.__class__ = _called_class(kind)
        if path_of(kind) == MULTIHEAD:
            module._qkv_same_embed_dim = False  # type: ignore[assignment]  # no encoder takes a path of its own
        if narrow:
            _narrow(module)
        elif path_of(kind) == MULTIHEAD:
            module.in_proj = LinearView(module, "in_proj_weight", "in_proj_bias")


def call_layers_of_units(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Let the attention modules call their layers whose units are channels of a plan or of a graph, in place.

    Args:
        model: a bare network.
        widths: group -> channels in the dense network.
    """
    modules = dict(model.named_modules())
    paths: dict[Units, list[str]] = {"whole": [], "head_width": []}
    for name, width in widths.items():
        path, _, leaf = name.rpartition(".")
        owner, layer = modules.get(path), modules.get(name)
        if owner is None or path_of(type(owner)) not in FORWARDS:
            continue
        if leaf in ("qk", "v"):
            paths["head_width"].append(path)
        elif leaf == "in_proj" or (isinstance(layer, nn.Linear) and layer.out_features != width):
            paths["whole"].append(path)
    for units, names in paths.items():
        call_layers(model, units, names)


def _known(module: Any) -> bool:
    """Whether a forward pass of ``FORWARDS`` can stand for the module's."""
    path = path_of(type(module))
    if path == MULTIHEAD and not getattr(module, "calls_layers", False):
        return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    if path == LATENT:  # else the latents are the queries, or nothing reads the heads
        return isinstance(module.q, nn.Linear) and isinstance(module.proj, nn.Linear)
    return path in FORWARDS


def _can_narrow(module: Any) -> bool:
    """Whether a module has one layer for queries, keys and values, and calls no views of it yet."""
    fused = path_of(type(module)) == MULTIHEAD or getattr(module, "qkv", None) is not None
    return path_of(type(module)) in NARROWED and fused and not hasattr(module, "query_key_rows")


def _narrow(module: Any) -> None:
    fused = path_of(type(module)) == MULTIHEAD
    owner, weight, bias = (module, "in_proj_weight", "in_proj_bias") if fused else (module.qkv, "weight", "bias")
    module.query_key_rows = getattr(owner, weight).shape[0] // 3 * 2
    if fused and hasattr(module, "in_proj"):
        del module.in_proj
    module.qk = RowsView(module, owner, weight, bias, True)
    module.v = RowsView(module, owner, weight, bias, False)
