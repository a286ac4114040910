"""Some layers of Llama 3 8B as E8T2 on one GPU: build, train, measure memory."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2
from nemo_upcycle_recipes.recipe import architecture

from nemo_upcycle.config import RECOMPUTE, ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine import cpu
from nemo_upcycle.engine.fused_gradients import fuse_weight_gradients
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.fields import moe_fields
from nemo_upcycle.nemo.model import UpcycledGPTConfig, architecture_fields
from nemo_upcycle.planner.workload import Mapping, Workload
from tests.tiny import tokens

ON_GPU = torch.cuda.is_available()
E8T2 = UpcyclingConfig()
GROUPED = {"moe_grouped_gemm": ON_GPU, "moe_permute_fusion": ON_GPU}
SEQUENTIAL = {"moe_grouped_gemm": False, "moe_permute_fusion": False}
EXPERTS = {"grouped": GROUPED, "sequential": SEQUENTIAL}
"""Implementations of the experts; the recipes use the grouped one."""

# --- Models ----------------------------------------------------------------------------------


def start(directory: str) -> None:
    """Initialize a process group of one rank, and Megatron's process groups."""
    if not ON_GPU:
        cpu.enable()
    torch.distributed.init_process_group(
        "nccl" if ON_GPU else "gloo", init_method=f"file://{directory}/store", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel(**ParallelFolding().parallel_sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(
    arch: Architecture, upcycling: UpcyclingConfig, dtype: torch.dtype, **overrides: Any
) -> torch.nn.Module:
    """Build the model with the settings of the recipes."""
    fields: dict[str, Any] = {
        **architecture_fields(arch),
        **moe_fields(arch, upcycling),
        "seq_length": arch.max_position_embeddings,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
    }
    fields |= overrides
    if not ON_GPU:
        fields |= cpu.MODEL_OVERRIDES | {"transformer_layer_spec": cpu.cpu_layer_spec}
    return UpcycledGPTConfig(**fields).configure_model(tokenizer=None).to(dtype).cuda()


def inputs(ids: torch.Tensor) -> dict[str, Any]:
    """Return the model's inputs; without a mask attention is causal."""
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    return {"input_ids": ids.cuda(), "position_ids": positions.cuda(), "attention_mask": None}


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def allocated(peak: bool = False) -> int:
    """Return the bytes allocated by tensors on the GPU."""
    if not ON_GPU:
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


# --- Layers of Llama 3 8B --------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training configuration.

    Attributes:
        capacity: Capacity factor; None drops no token.
        recompute: A key of `config.RECOMPUTE`.
        experts: A key of `EXPERTS`.
        fused: Whether the matrix products accumulate weight gradients directly in fp32, as with
            Apex in NVIDIA's image. Otherwise Megatron accumulates them afterwards.
        layers: Number of layers of the model.
        vocab: Vocabulary size; Llama 3's takes most of the time and memory of so few layers.
    """

    capacity: float | None = 1.0
    recompute: str = "none"
    experts: str = "grouped"
    fused: bool = True
    layers: int = 2
    vocab: int = 32000

    def __str__(self) -> str:
        capacity = "dropless" if self.capacity is None else f"{self.capacity:g}"
        sums = "fused" if self.fused else "added"
        model = f"{self.layers} | {self.vocab} | {capacity}"
        return f"{model} | {self.experts} | {sums} | {self.recompute}"

    @property
    def upcycling(self) -> UpcyclingConfig:
        return replace(E8T2, moe_expert_capacity_factor=self.capacity)

    def config(self, small: bool) -> dict[str, Any]:
        """Return the dense model's config."""
        config = LLAMA3_8B_E8T2.config | {
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
        }
        if small:
            config |= {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
            config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
        return config

    def workload(self, small: bool) -> Workload:
        """Return the planner's workload."""
        length = 128 if small else LLAMA3_8B_E8T2.schedule.seq_length
        arch = architecture(self.config(small))
        return Workload(arch, self.upcycling, length, global_batch_size=1)

    @property
    def mapping(self) -> Mapping:
        return Mapping(ParallelFolding(), 1, recompute=self.recompute)


CASES = [
    Case(),
    Case(layers=1),
    Case(layers=4),
    Case(layers=1, vocab=128256),
    Case(fused=False),
    Case(experts="sequential"),
    Case(recompute="moe_act"),
    Case(recompute="moe"),
    Case(capacity=4.0),
    Case(capacity=4.0, recompute="moe"),
    Case(capacity=None),
    Case(capacity=None, recompute="moe_act"),
    Case(capacity=None, experts="sequential"),
    Case(recompute="full"),
]


class Training:
    """A model with Megatron's DDP and distributed optimizer, configured like the recipes."""

    def __init__(self, case: Case, small: bool) -> None:
        workload = case.workload(small)
        # Otherwise the tracker keeps the number of layers of the first model.
        get_moe_layer_wise_logging_tracker().clear()
        overrides = EXPERTS[case.experts] | RECOMPUTE[case.recompute]
        if not ON_GPU and case.recompute == "moe_act":
            overrides = EXPERTS[case.experts]
        overrides |= {"seq_length": workload.seq_length}
        model = build(workload.arch, case.upcycling, torch.bfloat16, **overrides)
        config = model.config
        config.finalize_model_grads_func = finalize_model_grads
        options = {"overlap_grad_reduce": ON_GPU, "overlap_param_gather": ON_GPU}
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, **options
        )
        self.model = DistributedDataParallel(config, ddp, Float16Module(config, model))
        if case.fused:
            fuse_weight_gradients([self.model])
        adam = OptimizerConfig(lr=1e-5, clip_grad=1.0, bf16=True, use_distributed_optimizer=True)
        self.optimizer = get_megatron_optimizer(adam, [self.model])
        self.layers = Watch(model.decoder.layers)
        ids = tokens(1, workload.seq_length + 1, workload.arch.vocab_size).cuda()
        self.batch = inputs(ids[:, :-1]) | {"labels": ids[:, 1:]}

    def step(self) -> float:
        """Train one step; return the loss."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        (losses,) = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([self.batch]),
            model=[self.model],
            num_microbatches=1,
            seq_length=self.batch["labels"].shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        return float(losses["loss"])

    def close(self) -> None:
        """Release the memory; Megatron's hooks hold reference cycles invisible to Python."""
        for parameter in self.model.parameters():
            for tensor in (parameter, *vars(parameter).values()):
                if torch.is_tensor(tensor):
                    tensor.untyped_storage().resize_(0)


def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    def mean(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean()
        return loss, {"loss": loss.detach()}

    return model(**next(data)), mean


class Watch:
    """A recorder of bytes kept per forward pass of a layer, and of the last layer's routed rows."""

    def __init__(self, layers: Any) -> None:
        self.kept: list[int] = []
        self.routed: list[int] = []
        layers[-1].mlp.experts.register_forward_pre_hook(
            lambda _, given: self.routed.append(len(given[0]))
        )
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self.kept.append(-allocated()))
            layer.register_forward_hook(lambda *_: self._add())

    def _add(self) -> None:
        self.kept[-1] += allocated()


@dataclass(frozen=True)
class Measured:
    """Results of a training.

    Attributes:
        seconds: Median time per step.
        spread: Half the range of the times per step, in seconds.
        state: Bytes allocated between steps.
        routed: Rows given to the last layer's experts.
        kept: Bytes of the last layer's activations.
        peak: Bytes at the peak of a step beyond `state`.
        losses: First and last loss, in nats per token.
    """

    seconds: float
    spread: float
    state: int
    routed: int
    kept: int
    peak: int
    losses: tuple[float, float]


def measure(case: Case, small: bool, steps: int = 10, warm_up: int = 4) -> Measured:
    """Train some steps and measure time and memory."""
    training = Training(case, small)
    try:
        return _measure(training, case, steps, warm_up)
    finally:
        training.close()


def _measure(training: Training, case: Case, steps: int, warm_up: int) -> Measured:
    first = training.step()
    for _ in range(warm_up):
        training.step()
    free()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    state, seconds = allocated(), []
    training.layers.kept.clear()
    training.step()
    # Recomputed layers are recorded twice; among the first records, the last one counts.
    kept, peak = training.layers.kept[case.layers - 1], allocated(peak=True)
    last = first
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        last = training.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    spread = (max(seconds) - min(seconds)) / 2
    routed = training.layers.routed[-1]
    return Measured(
        statistics.median(seconds), spread, state, routed, kept, peak - state, (first, last)
    )
