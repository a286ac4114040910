"""Run the real NeMo, Lightning and Megatron-Core on CPU and gloo.

Everything that a machine without CUDA needs is in this file. Importing it changes nothing. A
recipe asks for CPU by naming `CpuMegatronStrategy` or `cpu_layer_spec`; they call `enable()`,
which changes the process it runs in, and refuses where there is a CUDA device.

What is changed, and why:

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
`token_dispatcher.maybe_move_tensor_to_cpu`    leaves all-to-all splits as tensors when they are on
                                               the CPU already, where lists are needed
`tensor_parallel.random` RNG state             reads the CUDA generator behind torch's back
`nemo.lightning.io.pl._fix_tensors_device`     asserts CUDA on resume; identity
`DistributedOptimizer` "step" state            written for Apex's and Transformer Engine's Adam;
                                               torch's AdamW keeps a `step` with each parameter, and
                                               has no state at all before the first step
checkpoint writers' result queue               Megatron spawns its process, for CUDA's sake; that
                                               imports NeMo again, 10 s in every run that saves.
                                               Forked; and killed with its rank, which it outlives
=============================================  =====================================================
"""

import contextlib
import copy
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache, wraps
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from nemo import lightning as nl
from nemo.lightning import io
from torch.overrides import TorchFunctionMode

from nemo_upcycle.config.layers import moe_layers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo.strategy import MegatronStrategy

CPU = torch.device("cpu")

MODEL_OVERRIDES: dict[str, Any] = {
    # Each fusion is a CUDA kernel, or needs Transformer Engine or Apex.
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    # Grouped GEMM needs Transformer Engine or grouped_gemm.
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    # gloo may still be sending an output when the schedule frees its memory.
    "deallocate_pipeline_outputs": False,
}
"""Fields of a model config that the CPU cannot have."""


# --- Layer spec ------------------------------------------------------------------------------


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, as the config says, that Megatron's sequence parallelism accepts."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight, self.bias = _norm_parameters(config, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalize(x, self.weight, self.bias, self.config, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """Norm and column-parallel linear in one, as Transformer Engine has it.

    Its parameter names are Transformer Engine's (`linear_qkv.layer_norm_weight`), so that
    checkpoints move between CPU and GPU and NeMo's importers and exporters work.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(config, input_size)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = _normalize(
            x,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.config,
            self.config.layernorm_epsilon,
        )
        return super().forward(x, *args, **kwargs)


def _norm_parameters(
    config: TransformerConfig, size: int
) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """Return a norm's weight, and its bias if it is a LayerNorm, as they are at the start."""
    start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    weight = torch.nn.Parameter(start(size, dtype=config.params_dtype))
    bias = None
    if config.normalization == "LayerNorm":
        bias = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype))
    for parameter in filter(lambda found: found is not None, (weight, bias)):
        # Megatron all-reduces the gradients of parameters marked so over the TP group.
        parameter.sequence_parallel = config.sequence_parallel
    return weight, bias


def _normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: TransformerConfig,
    eps: float,
) -> torch.Tensor:
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if bias is None:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


class CpuAttention(DotProductAttention):
    """Megatron's attention with what it leaves to Transformer Engine.

    Context parallelism: of this rank's queries to the keys and values of all CP ranks; a sequence
    is cut into 2·CP chunks, of which rank i has the chunks i and 2·CP-1-i. And a sliding window,
    also where the data bring a mask.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: Any, **kwargs: Any
    ) -> None:
        self.cp_group, self.window = pg_collection.cp, config.window_size
        config = copy.copy(config)
        config.context_parallel_size = 1  # Megatron's attention refuses any other
        config.window_size = None  # and adds no window to a mask
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend from [length/CP, rows, heads, size]; the mask is this rank's rows of it."""
        queries, keys = self._positions(len(query))
        if attention_mask is None:
            attention_mask = keys > queries[:, None]
        if self.window is not None:
            attention_mask = attention_mask | (keys < queries[:, None] - self.window[0])
        return super().forward(
            query, self._gather(key), self._gather(value), attention_mask, **kwargs
        )

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """Put the whole sequence together; its gradient goes back to the ranks, summed."""
        if self.cp_group.size() == 1:
            return local
        gathered = gather_from_sequence_parallel_region(local, group=self.cp_group)
        chunks = gathered.chunk(2 * self.cp_group.size())
        return torch.cat(chunks[::2] + chunks[1::2][::-1])

    def _positions(self, local_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions of this rank's queries and of all keys."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        positions = torch.arange(size * local_length)
        if size == 1:
            return positions, positions
        chunks = positions.chunk(2 * size)
        return torch.cat((chunks[rank], chunks[-1 - rank])), positions


class CpuSpecProvider(LocalSpecProvider):
    """Megatron's local modules with the norm fused into the linear layer that follows."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm


def cpu_layer_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Build the layers of one pipeline stage from modules that run on CPU.

    Args:
        config: The model's config.
        vp_stage: Virtual pipeline stage, None without virtual stages.

    Returns:
        The stage's layers, with Transformer Engine's parameter names.
    """
    enable()
    experts = config.num_moe_experts
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    is_moe = [False] * config.num_layers
    if experts is not None:
        is_moe = list(moe_layers(config.moe_layer_freq, config.num_layers))
    specs = {moe: _layer(config, experts if moe else None) for moe in set(is_moe)}
    return TransformerBlockSubmodules(
        layer_specs=[specs[moe] for moe in is_moe[first : first + count]], layer_norm=Norm
    )


def _layer(config: TransformerConfig, experts: int | None) -> ModuleSpec:
    """Build an MoE layer, or a dense one for None."""
    backend = CpuSpecProvider()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_self_attention(backend, config),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm() if experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(
                backend=backend, num_experts=experts, moe_grouped_gemm=False
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _self_attention(backend: BackendSpecProvider, config: TransformerConfig) -> ModuleSpec:
    plain = config.context_parallel_size == 1 and config.window_size is None
    head_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention() if plain else CpuAttention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


# --- Strategy and accelerator ----------------------------------------------------------------


class GlooAccelerator(CPUAccelerator, io.IOMixin):
    """CPU ranks, as many as the launcher starts on this node."""

    @staticmethod
    def auto_device_count() -> int:
        """Return the ranks that torchrun started here, 1 without a launcher."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class CpuMegatronStrategy(MegatronStrategy):
    """NeMo's Megatron strategy over gloo."""

    @wraps(MegatronStrategy.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        enable()
        super().__init__(*args, **kwargs)

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank in all, as in a notebook."""
        return self.cluster_environment.world_size() == 1

    def _configure_launcher(self) -> None:
        # Lightning refuses to launch processes from a notebook; one rank has none to launch.
        if not self.is_alone:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        if self.is_alone:
            # Without a port: it would stay open and in the environment, and a command that a
            # notebook starts would find it in use.
            self.store = torch.distributed.HashStore()
        super().setup_distributed()
        # NeMo seeds Megatron's RNG tracker only where there is a GPU.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "1234"))
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def trainer(**strategy: Any) -> nl.Trainer:
    """Make a trainer of one rank on CPU.

    Args:
        strategy: Arguments of NeMo's Megatron strategy.
    """
    return nl.Trainer(
        devices=1, accelerator=GlooAccelerator(), strategy=CpuMegatronStrategy(**strategy)
    )


# --- Patches ---------------------------------------------------------------------------------

_mode: "CudaToCpu | None" = None


def enable() -> None:
    """Make this process run Megatron on CPU. Calling it again does nothing.

    Raises:
        UpcyclingError: There is a CUDA device.
    """
    global _mode
    if torch.cuda.is_available():
        raise UpcyclingError(
            "A recipe asked for CPU mode, but this machine has a CUDA device. Leave the recipe's "
            "accelerator to it, or hide the device with CUDA_VISIBLE_DEVICES=''."
        )
    if _mode is None:
        _patch_torch_cuda()
        _patch_gloo()
        _patch_megatron()
        _patch_nemo()
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
    """Send to the CPU what Megatron and NeMo hard-code to CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _all_gather(
    outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> None:
    rank = torch.distributed.get_rank(group)
    outputs[rank].copy_(tensor)
    for source, output in enumerate(outputs):
        # gloo sends contiguous tensors only; pieces of one that is split by rows are.
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
    # The two generators are one here: Megatron would warn at every use.
    logging.getLogger(rng.__name__).addFilter(lambda record: "CPU RNG state" not in record.msg)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    _patch_distributed_optimizer()
    _patch_checkpoint_queue()


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

    filesystem_async._get_write_results_queue = forked_queue


def _begin_queue_process(parent: int) -> None:
    """Keep the forked process alive as long as its parent, and no longer."""
    # To collect what was inherited would end process groups, whose threads were not forked: abort.
    gc.freeze()
    gc.enable()
    # The kernel kills it when its parent is killed; it would wait for ever.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # killed before the line above
            os._exit(1)


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

    DistributedOptimizer.state_dict = state_dict_with_state
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step


def _patch_nemo() -> None:
    import nemo.lightning.io.pl as nemo_io

    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint
