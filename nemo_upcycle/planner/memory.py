"""Memory of a GPU in training: Megatron's DDP, distributed optimizer and pipeline.

Parameters, gradients and optimizer state are counted as Megatron lays them out. Activations are
a formula for what Transformer Engine's layers with fused attention save for the backward pass:
arXiv 2205.05198 §4, extended to grouped queries, gated layers and experts. `benchmarks/gpu.py`
compares the formula with layers on a GPU.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.families import dimensions
from nemo_upcycle.planner.workload import Mapping, Workload

UNEVEN_ROUTING = 1.5
"""Tokens of the fullest rank over the mean for which memory must suffice in dropless training."""

RESERVED = 5 * 2**30
"""Bytes of CUDA's context, NCCL's buffers and fragmentation of the allocator."""


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU.

    Attributes:
        parameters: Parameters in the training precision.
        gradients: Gradients in fp32.
        optimizer: Adam's two moments, and fp32 copies of bf16 parameters.
        activations: Activations of all microbatches in flight.
        working: Temporary memory: a recomputed layer, logits, and with FSDP a layer's parameters
            and gradients.
        reserved: Memory that no tensor uses.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: float
    working: float
    reserved: int = RESERVED

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(vars(self).values())


def memory(workload: Workload, mapping: Mapping) -> Memory:
    """Return the memory of the fullest GPU.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping; its microbatches must divide the batch.
    """
    stages = range(mapping.folding.pipeline_model_parallel_size)
    # Among the middle stages, the first has the most microbatches in flight.
    candidates = {0, min(1, stages[-1]), stages[-1]}
    return max((of_stage(workload, mapping, stage) for stage in candidates), key=lambda m: m.total)


def of_stage(workload: Workload, mapping: Mapping, stage: int) -> Memory:
    """Return the memory of a GPU in a pipeline stage."""
    state = _state(workload, mapping.folding, mapping.world_size, mapping.fsdp, stage)
    kept, computed = _layer_bytes(workload, mapping)
    activations = kept.of(*_layers_in_flight(workload, mapping, stage))
    working = max(computed.moe, computed.dense)
    if stage == mapping.folding.pipeline_model_parallel_size - 1:
        working = max(working, _logits(workload, mapping))
    if mapping.fsdp:
        working += _gathered(workload, mapping)
    return Memory(state.parameters, state.gradients, state.optimizer, activations, working)


class ModelState(NamedTuple):
    """Bytes of a GPU's parameters, gradients and optimizer state."""

    parameters: int
    gradients: int
    optimizer: int


@lru_cache(maxsize=16)
def _state(
    workload: Workload, folding: ParallelFolding, world_size: int, fsdp: bool, stage: int
) -> ModelState:
    """Return the state, which neither the microbatch nor recompute changes."""
    return model_state(workload, Mapping(folding, world_size, fsdp=fsdp), stage)


def model_state(workload: Workload, mapping: Mapping, stage: int) -> ModelState:
    """Return the largest size of Megatron's DDP buffers and distributed optimizer.

    Adam keeps two fp32 moments per parameter, and an fp32 copy of each bf16 parameter.
    """
    parameters = gradients = optimizer = 0
    per_parameter = 12 if workload.precision == "bf16-mixed" else 8
    for buffer, count in Counter(workload.buffers(mapping.folding, stage)).items():
        ranks, _ = mapping.replicas(buffer)
        padded = buffer.padded(ranks)
        held = padded // ranks if mapping.fsdp else padded
        parameters += count * held * workload.element_bytes
        gradients += count * held * 4
        optimizer += count * min(padded // ranks, buffer.elements) * per_parameter
    return ModelState(parameters, gradients, optimizer)


class LayerBytes(NamedTuple):
    """Bytes per microbatch that an MoE layer keeps, and that a dense layer keeps."""

    moe: float
    dense: float

    def of(self, moe_layers: float, dense_layers: float) -> float:
        """Return the bytes of a number of layers."""
        return self.moe * moe_layers + self.dense * dense_layers


@lru_cache(maxsize=8)
def _layer_bytes(workload: Workload, mapping: Mapping) -> tuple[LayerBytes, LayerBytes]:
    """Return the bytes that a layer keeps, and the temporary bytes of a recompute."""
    arch, sizes, each = workload.arch, dimensions(workload.arch), workload.element_bytes
    tokens = mapping.tokens(workload.seq_length)
    # Norm's input and output, both split over TP: sequence parallelism.
    norm = 2 * arch.hidden_size * each * tokens
    # q, k, v after the rotary embedding, the output, and fp32 log-sum-exps.
    attention = (sizes["qkv"] + sizes["queries"]) * each + 4 * arch.num_attention_heads
    attended = norm + attention * tokens
    neurons = (arch.fc1_rows + 1) * each
    dense = norm + arch.ffn_hidden_size * neurons * tokens
    routed, activated = _expert_bytes(workload, mapping, tokens)
    moe = norm + routed + (dense - norm if workload.upcycling.moe_shared_expert else 0)
    match mapping.recompute:
        case "full":
            kept = arch.hidden_size * each * tokens
            layer = LayerBytes(attended + moe + routed if workload.is_moe else 0, attended + dense)
            return LayerBytes(kept, kept), layer
        case "moe":
            again = moe - norm + routed  # and its gradients
            return LayerBytes(attended + norm, attended + dense), LayerBytes(again, 0)
        case "moe_act":
            return LayerBytes(attended + moe - activated, attended + dense), LayerBytes(
                activated, 0
            )
    # Gradients of the widest activations exist at the same time.
    widest = routed if workload.is_moe else arch.ffn_hidden_size * neurons * tokens
    return LayerBytes(attended + moe, attended + dense), LayerBytes(widest, 0)


def _expert_bytes(workload: Workload, mapping: Mapping, tokens: float) -> tuple[float, float]:
    """Return the activation bytes of a rank's experts, and the part of the activation function."""
    if not workload.is_moe:
        return 0, 0
    arch, folding, each = workload.arch, mapping.folding, workload.element_bytes
    capacity = workload.upcycling.moe_expert_capacity_factor
    # A rank that has all experts gets all of its tokens' assignments and no more.
    worst = UNEVEN_ROUTING if folding.expert_model_parallel_size > 1 else 1.0
    uneven = min(worst, capacity or worst)
    assignments = tokens * workload.model.topk * uneven
    # Every expert-tensor-parallel rank has all of their tokens, and a part of the neurons.
    inputs = arch.hidden_size * each * folding.expert_tensor_parallel_size
    activated = workload.model.expert_width * each * assignments
    router = 8 * workload.model.num_experts * tokens
    return inputs * assignments + (arch.fc1_rows + 1) * activated + router, activated


def _layers_in_flight(workload: Workload, mapping: Mapping, stage: int) -> tuple[float, float]:
    """Return the largest number of MoE and dense layers whose activations are kept.

    A stage runs this many microbatches forward before the first backward pass, in Megatron's
    1F1B and interleaved schedules.
    """
    stages = mapping.folding.pipeline_model_parallel_size
    virtual = mapping.folding.virtual_pipeline_model_parallel_size or 1
    microbatches = mapping.microbatches(workload.global_batch_size)
    ahead = stages - stage
    if virtual > 1:
        ahead += stages - stage - 1 + (virtual - 1) * stages
    flying = min(ahead, microbatches * virtual) / virtual
    moe, dense = workload.stages(mapping.folding)[stage]
    return moe * flying, dense * flying


def _logits(workload: Workload, mapping: Mapping) -> float:
    """Return the bytes of the logits, of an fp32 copy and of the softmax."""
    tokens = mapping.tokens(workload.seq_length)
    return tokens * workload.arch.vocab_size * (workload.element_bytes + 8)


def _gathered(workload: Workload, mapping: Mapping) -> float:
    """Return the bytes of two layers' parameters (one prefetched) and one layer's gradients."""
    buffers = workload.buffers(mapping.folding, 0)
    layer = sum(buffer.elements for buffer in buffers) / max(
        1, sum(workload.stages(mapping.folding)[0])
    )
    return layer * (2 * workload.element_bytes + 4)
