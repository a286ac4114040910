"""Transformer Engine's grouped linear layer as far as its weights go, to build Megatron's experts.

Transformer Engine cannot be imported without CUDA. Megatron's own code for its grouped experts
(TEGroupedMLP, TEGroupedLinear and their sharded_state_dict) needs of it only a module that holds
one weight an expert: that is here, the rest of the package is names without a meaning. Nothing is
computed with it.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

NAME, VERSION = "transformer_engine", "2.9.0"


def install() -> None:
    """Make `import transformer_engine` give the stand-in; before Megatron is imported."""
    sys.meta_path.insert(0, _Finder())
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        VERSION if name == "transformer-engine" else version(name)
    )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != NAME:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class _Module(ModuleType):
    __version__ = VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "GroupedLinear":
            return _grouped_linear()
        if name == "get_cpu_offload_context":
            return lambda *_: (nullcontext(), None)
        if name[0].isupper():
            import torch

            return type(name, (torch.nn.Module,), {})
        return importlib.import_module(f"{self.__name__}.{name}")


def _grouped_linear() -> type:
    import torch

    class GroupedLinear(torch.nn.Module):
        def __init__(
            self, num_gemms: int, in_features: int, out_features: int, tp_size: int = 1, **kw: Any
        ) -> None:
            super().__init__()
            self.num_gemms, self.use_bias = num_gemms, False
            self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
            if kw["parallel_mode"] == "column":
                out_features //= tp_size
            elif kw["parallel_mode"] == "row":
                in_features //= tp_size
            for index in range(num_gemms):
                weight = torch.nn.Parameter(torch.randn(out_features, in_features))
                self.register_parameter(f"weight{index}", weight)

        def get_extra_state(self) -> torch.Tensor:
            return torch.empty(0)

    return GroupedLinear
