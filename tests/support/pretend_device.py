"""A pretend accelerator: tensors that say another device, hold their values on the CPU, and refuse what CUDA refuses.

What a machine without a GPU can prove of code that runs on one: nothing is left on the wrong device, and how often the
host waits. Kernels are the CPU's, so results are the CPU's bit for bit. Refused are operations that mix devices (zero-
dimensional CPU tensors in pointwise operations and index tensors on the CPU excepted), numpy's view of device memory,
and random numbers of another device's generator. Pinned memory is ordinary memory.

The registration changes torch for good: ``start`` belongs into processes of its own (``pool``).
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
CPU = torch.device("cpu")
COPIES = {"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# the CPU's 0-dimensional tensors that these take become numbers, as in pointwise operations
NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "_local_scalar_dense"}
# what CUDA answers on the host: it has to know a size, a number or an error before it can go on
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
    "bincount", "equal", "is_nonzero", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_lstsq",
    "repeat_interleave",
}  # fmt: skip


@dataclass
class Traffic:
    """What went on between host and device: waits of the host, bytes each way, operations that launch something."""

    syncs: int = 0
    up: int = 0
    down: int = 0
    operations: int = 0
    waits: Counter[str] = field(default_factory=Counter)  # operation -> how often the host waited for it

    def wait(self, name: str) -> None:
        self.syncs += 1
        self.waits[name] += 1


_now: list[Traffic] = []
_generators: dict[int, "Generator"] = {}  # by the address of the C++ object
_states: dict[str, Tensor] = {}  # of the device's default generator


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """What goes on within it."""
    traffic = Traffic()
    _now.append(traffic)
    try:
        yield traffic
    finally:
        _now.remove(traffic)


def on_host(tensor: Tensor) -> Tensor:
    """The values themselves, for tests: not a copy, and nothing is counted."""
    return tensor.values_ if isinstance(tensor, Pretend) else tensor


class Pretend(Tensor):
    """A tensor of the device; ``values_`` lies on the CPU."""

    values_: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> "Pretend":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip

    def __init__(self, values: Tensor):
        self.values_ = values

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretend({self.values_})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Modules that change their precision or memory order in place set this."""
        if not isinstance(value, Pretend):
            raise RuntimeError("incompatible tensor type: data of one device cannot be set to that of another")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.values_ = value.values_

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, *_args: Any) -> Tensor:
        raise RuntimeError(f"cannot pin '{NAME}': only dense CPU tensors can be pinned")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees operations without a tensor as well: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: refused, or done on the values; its results say the device that CUDA's would."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    asked = kwargs.get("device")
    there = bool(ours) if asked is None else torch.device(asked).type == NAME
    generators = [leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)]
    if any((generator._cdata in _generators) != there for generator in generators):  # type: ignore[attr-defined]
        raise RuntimeError(f"Expected a '{NAME if there else 'cpu'}' device type for generator ({func})")
    if not ours and not there:
        return func(*args, **kwargs)
    name = func._schema.name.partition("::")[2]
    _refuse(func, name, args, tensors, ours)
    _count(func, name, args, kwargs, tensors, there)
    given = tree_map(on_host, args)
    named = {key: on_host(value) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    if asked is not None:
        named["device"] = CPU
    named.pop("pin_memory", None)
    draws = torch.Tag.nondeterministic_seeded in func.tags and not generators
    with _drawing() if draws and there else contextlib.nullcontext():
        out = func(*given, **named)
    if not there or func._schema.name.startswith("c10d::"):
        return out
    return _wrapped(func, args, kwargs, out, bool(ours))


def _wrapped(func: Any, args: Any, kwargs: Any, out: Any, aliased: bool) -> Any:
    """Results as tensors of the device: of an operation in place the very arguments, of a view one that knows it."""
    found = tree_map(lambda leaf: Pretend(leaf) if type(leaf) is Tensor else leaf, out)
    if any(argument.alias_info is not None for argument in func._schema.arguments) and aliased:
        if func._schema.name == "aten::resize_":
            raise NotImplementedError("resize_ has no kernel here")
        if func._schema.returns:
            return return_and_correct_aliasing(func, args, kwargs, found)
    return found


def _refuse(func: Any, name: str, args: Any, tensors: list[Tensor], ours: list[Pretend]) -> None:
    """What CUDA refuses: tensors of two devices in one operation."""
    if name in COPIES or not ours:
        return
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretend)]
    if name in INDEXED:
        table, given = args[0], [value for value in args[2:3] if isinstance(value, Tensor)]
        alien = [t for t in (*args[1], *given) if isinstance(t, Pretend) and not isinstance(table, Pretend)]
        alien += [v for v in given if isinstance(table, Pretend) and not isinstance(v, Pretend) and v.dim()]
        if alien:
            raise RuntimeError(
                f"indices should be on the cpu or on the device of the indexed tensor, values on its ({func})"
            )
        return
    number = torch.Tag.pointwise in func.tags or name in NUMBERS
    if any(tensor.dim() or not number for tensor in others):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu! ({func})")


def _count(func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], there: bool) -> None:
    """Note an operation where somebody counts."""
    if not _now:
        return
    up, down, waits = 0, 0, []
    if name in COPIES:
        up, down, waits = _copied(name, args, kwargs, there)
    elif name in INDEXED:
        up, waits = _indexed(name, args)
    elif name in WAITS:
        down, waits = tensors[0].element_size() * (name == "_local_scalar_dense"), [name]
    aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    view = bool(aliases) and not any(alias.is_write for alias in aliases)
    for traffic in _now:
        traffic.operations += not view
        traffic.up += up
        traffic.down += down
        for wait in waits:
            traffic.wait(wait)


def _copied(name: str, args: Any, kwargs: Any, there: bool) -> tuple[int, int, list[str]]:
    """Bytes to the device and back, and whether the host waits: for every copy back, and for those that block."""
    source = args[1] if name == "copy_" else args[0]
    lands = there if name == "_to_copy" else isinstance(args[0] if name == "copy_" else args[1], Pretend)
    if isinstance(source, Pretend) == lands:
        return 0, 0, []
    size = source.numel() * source.element_size()
    blocks = not (kwargs.get("non_blocking") or (name != "_to_copy" and len(args) > 2 and args[2]))
    what = "to the device, blocking" if lands else "to the host"
    return size * lands, size * (not lands), [what] if size and (blocks or not lands) else []


def _indexed(name: str, args: Any) -> tuple[int, list[str]]:
    """Bytes to the device and waits: index tensors of the host are copied, masks have to be counted."""
    given = [index for index in args[1] if isinstance(index, Tensor)]
    hosts = [index for index in given if not isinstance(index, Pretend)]
    masks = [index for index in given if index.dtype in (torch.bool, torch.uint8) and not _fills(name, args)]
    waits = [f"{name} by a CPU tensor"] * len(hosts) + [f"{name} by a mask"] * len(masks)
    return sum(index.numel() * index.element_size() for index in hosts), waits


def _fills(name: str, args: Any) -> bool:
    """A mask that one number is written to: CUDA needs no count of its entries for that."""
    return name.startswith(("index_put", "_index_put")) and isinstance(args[2], Tensor) and args[2].numel() == 1


class Generator(torch._C.Generator):
    """torch.Generator, of this device as well: its random numbers are the CPU's of the same seed."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        own = torch.device(device).type == NAME
        made = super().__new__(cls, CPU if own else device)
        if own:
            _generators[made._cdata] = made  # type: ignore[attr-defined]
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, 0) if self._cdata in _generators else super().device  # type: ignore[attr-defined]


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """The CPU's default generator stands in for the device's own; it is as it was afterwards."""
    before = torch._C.default_generator.get_state()
    torch._C.default_generator.set_state(_states["default"])
    try:
        yield
    finally:
        _states["default"] = torch._C.default_generator.get_state()
        torch._C.default_generator.set_state(before)


class _Module(_DummyBackendModule):
    """torch.pretend."""

    def manual_seed_all(self, seed: int) -> None:
        _states["default"] = torch._C.Generator().manual_seed(seed).get_state()

    manual_seed = manual_seed_all

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, _device: Any = None) -> None:
        for traffic in _now:
            traffic.wait("synchronize")

    def set_device(self, _device: Any) -> None:
        """There is one."""


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_rest: Any) -> Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype, device=CPU))


def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **_rest: Any) -> Tensor:
    return Pretend(torch.empty(size, dtype=dtype, device=CPU, memory_format=memory_format or torch.contiguous_format))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _run(torch.ops.aten.copy_.default, (target, source, non_blocking), {})
    return target


_started: list[Any] = []


def start() -> torch.device:
    """Register the device in this process, once; returns it."""
    if not _started:
        from tests.support import pretend_kernels

        _setup_privateuseone_for_python_backend(NAME, _Module())
        kernels: dict[str, Callable[..., Any]] = {
            "empty_strided": _empty_strided, "empty.memory_format": _empty, "_copy_from": _copy_from,
        }  # fmt: skip
        library = torch.library.Library("aten", "IMPL")
        for name, kernel in kernels.items():
            library.impl(name, kernel, "PrivateUse1")
        pretend_kernels.register(library)
        torch.Generator = Generator  # type: ignore[misc]
        Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign,assignment]
        torch.pretend.manual_seed_all(0)  # type: ignore[attr-defined]
        mode = _Everywhere()
        mode.__enter__()
        _started.extend([library, mode])
    return torch.device(NAME, 0)
