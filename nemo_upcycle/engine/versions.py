"""Mends of libraries whose versions do not fit each other, made while they are imported.

==============================================  ==================================================
numpy 2, Megatron-Core 0.15                     checkpoints call `np.product`, which is gone
Triton 3.5, Transformer Engine 2.9              kernels of the fused permutation call
                                                `core.get_int_dtype`, a function that Triton no
                                                longer evaluates while compiling
                                                (NVIDIA/TransformerEngine#2286)
nvcc, Megatron-Core 0.15                        every process compiles an extension at import, for
                                                memory that only Megatron's inference uses
==============================================  ==================================================

A library is mended only where it needs it, and when it is imported: nothing is imported here.
"""

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MEGATRON = "megatron.core"
PERMUTATION = "transformer_engine.pytorch.triton.permutation"
UNIFIED_MEMORY = "megatron.core.inference.unified_memory"

Around = Callable[[ModuleType], Any]
"""A context manager around the execution of a module."""


def mend() -> None:
    """Mend what is imported already, and whatever will be; idempotent."""
    for name, around in MENDED.items():
        if name in sys.modules:
            with around(sys.modules[name]):
                pass
    if not any(isinstance(finder, Mender) for finder in sys.meta_path):
        sys.meta_path.insert(0, Mender(MENDED))


def give_product(numpy: Any) -> None:
    """Give numpy 2 the name `product`, which numpy 1 had for `prod`."""
    if not hasattr(numpy, "product"):
        numpy.product = numpy.prod


def mend_permutation(permutation: Any) -> None:
    """Let Triton evaluate `get_int_dtype` in the kernels of Transformer Engine's permutation.

    Only this module gets another `core`; Triton's own stays as it is.

    Args:
        permutation: Transformer Engine's module.
    """
    core: Any = getattr(permutation, "core", None)
    evaluated: Any = getattr(getattr(permutation, "triton", None), "constexpr_function", None)
    if core is None or evaluated is None:
        return
    tritons: Any = sys.modules.get(core.__name__)
    if core is not tritons:  # mended before
        return
    own = ModuleType(core.__name__)  # Triton knows modules by their very type
    vars(own).update(vars(core), get_int_dtype=evaluated(core.get_int_dtype))
    permutation.core = own


@contextmanager
def _mended_permutation(module: ModuleType) -> Iterator[None]:
    yield
    mend_permutation(module)


@contextmanager
def without_compiler(_: ModuleType) -> Iterator[None]:
    """Import Megatron's unified memory as on a machine without a compiler."""
    from torch.utils import cpp_extension

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("training needs no unified memory")

    compiles = cpp_extension.load_inline
    cpp_extension.load_inline = refuse
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Failed to create unified memory mempool")
            yield
    finally:
        cpp_extension.load_inline = compiles


@contextmanager
def _given_product(_: ModuleType) -> Iterator[None]:
    import numpy

    give_product(numpy)
    yield


MENDED: dict[str, Around] = {
    MEGATRON: _given_product,
    PERMUTATION: _mended_permutation,
    UNIFIED_MEMORY: without_compiler,
}
"""What is mended around the execution of a module."""


class Mender(importlib.abc.MetaPathFinder):
    """A finder that executes some modules within a context.

    Args:
        modules: The contexts by the modules' names.
    """

    def __init__(self, modules: dict[str, Around]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find one of the modules through the other finders, and wrap its loader."""
        if name not in self._modules:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._modules[name])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, around: Around) -> None:
        self._loader, self._around = loader, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self._around(module):
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:  # such as get_source, for tracebacks and Triton
        return getattr(self._loader, name)
