"""Import torchvision and timm without the compiler of torch, which is a third of their time: ``check`` never uses it.

torchvision 0.26 imports ``torch._dynamo`` for one function that ``roi_align`` calls; timm decorates one iterator with
``torch.compiler.disable``. Both are given functions that import the compiler when they are called first. A version that
wants more of it gets it: nothing but time is lost.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
COMPILER_UTILS = "torch._dynamo.utils"


def import_without_compiler(timm: bool) -> None:
    """Import torchvision's operators, and leave ``torch._dynamo`` to its first use.

    Does nothing where one of them is imported already, or is missing.

    Args:
        timm: whether timm is imported as well.
    """
    if not {"timm", "torchvision", COMPILER}.isdisjoint(sys.modules):
        return
    for name, deferred in (("torchvision.ops", _deferred_utils), ("timm", _deferred_disable))[: 2 if timm else 1]:
        try:
            with deferred():
                importlib.import_module(name)
        except Exception:  # another version: it is imported as always by the module that needs it, which may complain
            return


@contextmanager
def _deferred_utils() -> Iterator[None]:
    """``torch._dynamo.utils`` is a module of one function."""
    importlib.import_module("torch")
    stand_in = ModuleType(COMPILER_UTILS)
    vars(stand_in)["is_compile_supported"] = _is_compile_supported
    sys.modules[COMPILER_UTILS] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(COMPILER_UTILS) is stand_in:
            del sys.modules[COMPILER_UTILS]


@contextmanager
def _deferred_disable() -> Iterator[None]:
    """``torch.compiler.disable`` is torch's own form of it that imports the compiler at the first call."""
    compiler: Any = importlib.import_module("torch.compiler")
    before = compiler.disable
    compiler.disable = _disable
    try:
        yield
    finally:
        compiler.disable = before


def _is_compile_supported(device_type: str) -> bool:
    return importlib.import_module(COMPILER_UTILS).is_compile_supported(device_type)


def _disable(fn: Callable[..., Any] | None = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    from torch._compile import _disable_dynamo

    return _disable_dynamo(recursive=recursive) if fn is None else _disable_dynamo(fn, recursive)
