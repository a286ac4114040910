"""Patches of torch and Megatron-Core for running on CPU and gloo, and the reasons.

=============================================  =====================================================
`torch.cuda` streams, events, RNG state, …     called all over Megatron and NeMo; no-ops, or the
                                               CPU's random generator
`device="cuda"`, `.cuda()`, `pin_memory=True`  hard-coded on the training path; a TorchFunctionMode
                                               sends them to the CPU
`Tensor.type()`                                the distributed optimizer takes only
                                               `torch.cuda.*Tensor`; same mode
`all_gather`, `reduce_scatter` of lists        gloo wants pieces of equal size; the all-to-all
                                               dispatcher with expert-TP has unequal ones. Built
                                               from broadcasts and reductions
`moe_utils.te_general_gemm`                    a NameError without Transformer Engine; None
`token_dispatcher.maybe_move_tensor_to_cpu`    leaves all-to-all splits that are on the CPU already
                                               as tensors, but lists are needed
`tensor_parallel.random` RNG state             reads the CUDA generator behind torch's back
`DistributedOptimizer` "step" state            written for Apex's and Transformer Engine's Adam;
                                               torch's AdamW keeps a `step` with each parameter, and
                                               has no state at all before the first step
checkpoint writers' result queue               because of CUDA, Megatron spawns its process, which
                                               imports NeMo again: over 10 s in every run that
                                               saves. Here forked, and killed with the rank
views in a checkpoint                          Megatron clones every tensor that is part of a larger
                                               buffer, as all are with DDP: parameters and optimizer
                                               would be in memory twice. Here the same memory is
                                               described as a tensor of its own
`get_parameter_state_dp_zero`                  gathers the optimizer's state for a checkpoint in
                                               buffers that hold the state once more, even if one
                                               rank has all of it. Such a rank copies parameter by
                                               parameter
=============================================  =====================================================
"""

import contextlib
import gc
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import cache, wraps
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import end_with

CPU = torch.device("cpu")

_STATES = ("param", "exp_avg", "exp_avg_sq")

_mode: "CudaToCpu | None" = None


def enable() -> None:
    """Make this process run Megatron on CPU. Calling it again does nothing.

    Raises:
        UpcyclingError: There is a CUDA device.
    """
    global _mode
    if torch.cuda.is_available():
        raise UpcyclingError(
            "CPU mode is set, but this machine has a CUDA device. Leave the recipe's accelerator "
            "at 'auto', or hide the device with CUDA_VISIBLE_DEVICES=''."
        )
    if _mode is None:
        _patch_torch_cuda()
        _patch_gloo()
        _patch_megatron()
        _mode = CudaToCpu()
        _mode.__enter__()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "_Event") -> float:
        return 0.0


class _Stream(_Event):
    device = CPU

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


@contextlib.contextmanager
def _stream(_: Any) -> Iterator[None]:
    yield


def _nothing(*_: Any, **__: Any) -> None: ...


def _patch_torch_cuda() -> None:
    current = _Stream()
    patches = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: current,
        "default_stream": lambda *_: current,
        "stream": _stream,
        "current_device": lambda: CPU,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "reset_peak_memory_stats": _nothing,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    }
    for name, value in patches.items():
        setattr(torch.cuda, name, value)


class CudaToCpu(TorchFunctionMode):
    """Redirect hard-coded CUDA devices of Megatron and NeMo to the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            kwargs = dict(kwargs)
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _same(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (CPU, *args[1:])
    return torch.Tensor.to(tensor, *args, **kwargs)


def _type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    found = torch.Tensor.type(tensor, *args, **kwargs)
    return found if args or kwargs else found.replace("torch.", "torch.cuda.", 1)


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.cuda: _same,
    torch.Tensor.pin_memory: _same,
    torch.Tensor.record_stream: _nothing,
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
}


def _all_gather(
    outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> None:
    rank = torch.distributed.get_rank(group)
    outputs[rank].copy_(tensor)
    for source, output in enumerate(outputs):
        # gloo sends only contiguous tensors; pieces of a tensor split by rows are contiguous.
        torch.distributed.broadcast(output, group=group, group_src=source)


def _reduce_scatter(
    output: torch.Tensor, inputs: list[torch.Tensor], group: Any = None, **_: Any
) -> None:
    rank = torch.distributed.get_rank(group)
    for destination, tensor in enumerate(inputs):
        part = tensor.contiguous().clone()
        torch.distributed.reduce(part, group=group, group_dst=destination)
        if destination == rank:
            output.copy_(part)


def _patch_gloo() -> None:
    torch.distributed.all_gather = _all_gather
    torch.distributed.reduce_scatter = _reduce_scatter


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    # Both generators are the same here; Megatron would warn at every use.
    logging.getLogger(rng.__name__).addFilter(lambda record: "CPU RNG state" not in record.msg)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    _patch_distributed_optimizer()
    _patch_checkpoint_queue()
    _patch_checkpoint_views()


def _patch_checkpoint_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    @cache
    def forked_queue() -> Any:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        gc.disable()
        try:
            manager.start(_begin_queue_process, (os.getpid(),))
        finally:
            gc.enable()
        return manager.Queue()

    # Newer versions of Megatron-Core have no underscore, and an argument.
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, lambda *_: forked_queue())


def _patch_checkpoint_views() -> None:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    resolve_data = DefaultSavePlanner.resolve_data

    def without_the_rest(self: Any, item: Any) -> Any:
        data = resolve_data(self, item)
        return with_storage_of_its_own(data) if isinstance(data, torch.Tensor) else data

    DefaultSavePlanner.resolve_data = without_the_rest


def with_storage_of_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the same memory whose storage ends where the tensor ends.

    Args:
        tensor: A tensor on CPU; returned as it is if it is not contiguous.
    """
    size = tensor.numel() * tensor.itemsize
    storage = tensor.untyped_storage()
    if storage.size() == size or not tensor.is_contiguous():
        return tensor
    start = tensor.storage_offset() * tensor.itemsize
    alone = torch.empty(0, dtype=tensor.dtype)
    return alone.set_(storage[start : start + size], 0, tensor.shape)


def _begin_queue_process(parent: int) -> None:
    """Keep the forked process alive as long as its parent, and no longer."""
    # Collecting inherited objects would destroy process groups, whose threads were not forked.
    gc.freeze()
    gc.enable()
    # Otherwise this process would wait forever.
    end_with(parent)


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _patch_distributed_optimizer() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict_with_state(self: Any) -> Any:
        # Megatron reads every parameter's `step`, also before the first one.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                state.setdefault("step", torch.tensor(0.0))
                state.setdefault("exp_avg", torch.zeros_like(parameter))
                state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        return state_dict(self)

    def load_state_dict_with_own_steps(self: Any, loaded: Any) -> None:
        load_state_dict(self, loaded)
        # Megatron gives all parameters one `step` tensor, and AdamW counts it up for each.
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        # The checkpoint keeps `step` once for all parameters; it is loaded by then.
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[main_param].get("step")
        if step is not None and "step" not in tensors:
            tensors = {**tensors, "step": step.clone()}
        return set_states(self, model_param, tensors)

    gather = DistributedOptimizer.get_parameter_state_dp_zero

    @wraps(gather)
    def gather_or_copy(self: Any, *args: Any, empty_data: bool = False, **kwargs: Any) -> Any:
        if self.data_parallel_group.size() > 1 or empty_data:
            return gather(self, *args, empty_data=empty_data, **kwargs)
        return whole_state(self)

    DistributedOptimizer.get_parameter_state_dp_zero = gather_or_copy
    DistributedOptimizer.state_dict = state_dict_with_state
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step


def whole_state(optimizer: Any) -> dict[Any, Any]:
    """Return the state of a distributed optimizer that one rank has whole, in Megatron's form.

    Args:
        optimizer: A `DistributedOptimizer` of one data-parallel rank.

    Returns:
        By buffer and dtype: parameters and both moments, each as one vector in fp32 without the
        padding between buckets.
    """
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, ranges in enumerate(optimizer.gbuf_ranges):
        ((dtype, buckets),) = ranges.items()
        buffer = optimizer.buffers[number]
        vectors = {key: torch.zeros(buffer.numel_unpadded) for key in _STATES}
        start = 0
        for bucket, range_of_bucket in zip(buffer.buckets, buckets, strict=True):
            for parameter, ranges_of_parameter in range_of_bucket["param_map"].items():
                tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                place = ranges_of_parameter["gbuf_local"]
                for key, vector in vectors.items():
                    vector[start + place.start : start + place.end].copy_(tensors[key].detach())
            start += bucket.numel_unpadded
        state[number] = {dtype: {**vectors, "numel_unpadded": buffer.numel_unpadded}}
    return state
