"""A GPU and its host on a machine without a GPU: two kinds of tensors, both on the CPU.

Megatron's `HybridDeviceOptimizer` and `DistributedOptimizer` run unchanged. Tensors that
these copy with `.cpu()`, or make with `device="cpu"`, belong to the host, and so do results
computed from such tensors. All other tensors belong to the GPU.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_IS_CUDA = torch.Tensor.is_cuda.__get__


class TwoProcessors(TorchFunctionMode):
    """Keep track of which tensors are the host's."""

    def __init__(self) -> None:
        super().__init__()
        self._of_host: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def is_on_host(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor in self._of_host

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func == _IS_CUDA:
            return not self.is_on_host(first)
        target = _target(func, args, kwargs)
        if target is not None and func in (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.to):
            if self.is_on_host(first) == (target == "cpu"):
                return first
            return self._mark(func(*args, **kwargs).clone(), target == "cpu")
        result = func(*args, **kwargs)
        return self._mark(result, target == "cpu" or self.is_on_host(first))

    def _mark(self, result: Any, of_host: bool) -> Any:
        if of_host and isinstance(result, torch.Tensor):
            self._of_host[result] = True
        return result


def _target(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the processor that a call names."""
    if func is torch.Tensor.cpu:
        return "cpu"
    if func is torch.Tensor.cuda:
        return "cuda"
    named = kwargs.get("device", args[1] if func is torch.Tensor.to and len(args) > 1 else None)
    return named if named in ("cpu", "cuda") else None


@contextlib.contextmanager
def gpu_and_host() -> Iterator[TwoProcessors]:
    """Let Megatron find a GPU and its host.

    Megatron's distributed optimizer is read anew: without this package's patches for CPU, and on
    the branches that it takes with Transformer Engine.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    name = "megatron.core.optimizer.unpatched_distrib_optimizer"
    spec = importlib.util.spec_from_file_location(name, distrib_optimizer.__file__)
    assert spec is not None and spec.loader is not None
    unpatched = importlib.util.module_from_spec(spec)
    sys.modules[name] = unpatched
    spec.loader.exec_module(unpatched)
    unpatched.HAVE_APEX_OR_TE = unpatched.USING_TE_OPTIMIZER = True
    patched = optimizers.DistributedOptimizer
    optimizers.DistributedOptimizer = unpatched.DistributedOptimizer
    is_te_min_version = optimizer_config.is_te_min_version
    optimizer_config.is_te_min_version = lambda _: True
    try:
        with TwoProcessors() as processors:
            yield processors
    finally:
        optimizers.DistributedOptimizer = patched
        optimizer_config.is_te_min_version = is_te_min_version
        del sys.modules[name]
