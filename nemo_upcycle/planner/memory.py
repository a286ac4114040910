"""Memory of a GPU in training: Megatron's DDP, distributed optimizer and pipeline.

Parameters, gradients and optimizer state are counted as Megatron lays them out. Activations are
a formula for what Transformer Engine's layers with fused attention save for the backward pass:
arXiv 2205.05198 §4, extended to grouped queries, gated layers and experts. `benchmarks/gpu.py`
compares the formula with layers on a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from nemo_upcycle.config import PRECISIONS, ParallelFolding
from nemo_upcycle.families import dimensions
from nemo_upcycle.planner.optimizer import gradient_bytes, passing_bytes, state_bytes
from nemo_upcycle.planner.workload import Mapping, Workload

UNEVEN_ROUTING = 1.2
"""Tokens of the fullest rank over the mean for which memory must suffice in dropless training,
averaged over the layers and microbatches whose activations are kept. The largest round number with
which all dropless runs that were published fit."""

RESERVED = 5 * 2**30
"""Bytes of CUDA's context, NCCL's buffers and fragmentation of the allocator."""


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU.

    Attributes:
        parameters: Parameters in the training precision, and their copies in FP8.
        gradients: Gradients, in fp32 or bf16.
        optimizer: Adam's two moments and fp32 copies of bf16 parameters, less what is offloaded.
        activations: Activations of all microbatches in flight.
        working: Temporary memory: a recomputed layer, logits.
        reserved: Memory that no tensor uses.
        passing: Temporary memory of the optimizer while Adam steps or a checkpoint is loaded,
            beyond the activations and working memory, which are free then.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: float
    working: float
    reserved: int = RESERVED
    passing: float = 0

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
    layers = _layer_bytes(workload, mapping)
    states = _states(workload, mapping.folding, mapping.world_size)
    candidates = (_of_stage(workload, mapping, stage, state, *layers) for stage, state in states)
    return max(candidates, key=lambda memory: memory.total)


def of_stage(workload: Workload, mapping: Mapping, stage: int) -> Memory:
    """Return the memory of a GPU in a pipeline stage."""
    state = model_state(workload, mapping, stage)
    return _of_stage(workload, mapping, stage, state, *_layer_bytes(workload, mapping))


def _of_stage(
    workload: Workload,
    mapping: Mapping,
    stage: int,
    state: "ModelState",
    kept: "LayerBytes",
    computed: "LayerBytes",
) -> Memory:
    activations = kept.of(*_layers_in_flight(workload, mapping, stage))
    working = max(computed.moe, computed.dense)
    if stage == mapping.folding.pipeline_model_parallel_size - 1:
        working = max(working, _logits(workload, mapping))
    passing = max(0, state.passing - activations - working)
    return Memory(*state[:3], activations, working, passing=passing)


class ModelState(NamedTuple):
    """Bytes of a GPU's parameters, gradients and optimizer state.

    `passing` are further bytes while Adam steps or a checkpoint is loaded.
    """

    parameters: int
    gradients: int
    optimizer: int
    passing: int = 0


@lru_cache(maxsize=16)
def _states(
    workload: Workload, folding: ParallelFolding, world_size: int
) -> list[tuple[int, ModelState]]:
    """Return the stages that can be the fullest, and their state.

    Neither the microbatch nor recompute changes the state.
    """
    mapping, last = Mapping(folding, world_size), folding.pipeline_model_parallel_size - 1
    # Among the middle stages, the first has the most microbatches in flight.
    stages = {0, min(1, last), last}
    return [(stage, model_state(workload, mapping, stage)) for stage in stages]


def model_state(workload: Workload, mapping: Mapping, stage: int) -> ModelState:
    """Return the largest size of Megatron's DDP buffers and distributed optimizer.

    Of an offloaded state, the part on the GPU is at most as large as returned: Megatron offloads
    whole parameters until the fraction is reached.
    """
    parameters = gradients = own = 0
    # Transformer Engine keeps weights in FP8 too, by rows and by columns.
    held = workload.element_bytes + (2 if PRECISIONS[workload.precision].is_fp8 else 0)
    for buffer, count in workload.buffers(mapping.folding, stage).items():
        ranks, _ = mapping.replicas(buffer)
        padded = buffer.padded(ranks)
        parameters += count * padded * held
        gradients += count * padded * gradient_bytes(workload)
        own += count * min(padded // ranks, buffer.elements)
    state, passing = state_bytes(workload), passing_bytes(workload)
    return ModelState(parameters, gradients, ceil(own * state), ceil(own * passing))


class LayerBytes(NamedTuple):
    """Bytes per microbatch that an MoE layer keeps, and that a dense layer keeps."""

    moe: float
    dense: float

    def of(self, moe_layers: float, dense_layers: float) -> float:
        """Return the bytes of a number of layers."""
        return self.moe * moe_layers + self.dense * dense_layers


def _layer_bytes(workload: Workload, mapping: Mapping) -> tuple[LayerBytes, LayerBytes]:
    """Return the bytes that a layer keeps, and the temporary bytes of a recompute."""
    arch, sizes, each = workload.arch, dimensions(workload.arch), workload.element_bytes
    tokens, factor = mapping.tokens(workload.seq_length), workload.factor_bytes
    # Norm's input and output, both split over TP: sequence parallelism.
    norm = arch.hidden_size * (each + factor) * tokens
    # q, k, v after the rotary embedding, the output, and fp32 log-sum-exps.
    attention = (sizes["qkv"] + sizes["queries"]) * each + 4 * arch.num_attention_heads
    if factor < each:
        attention += sizes["queries"] * factor  # attention itself keeps its output in bf16
    attended = norm + attention * tokens
    neurons = arch.fc1_rows * each + factor
    dense = norm + arch.ffn_hidden_size * neurons * tokens
    routed, activated = _expert_bytes(workload, mapping, tokens)
    moe = norm + routed + workload.model.shared_width * neurons * tokens
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
        case "norm_act":
            # A norm's output, in front of the experts, is computed again too.
            output = arch.hidden_size * factor * tokens
            kept = attended + moe - activated - output
            return LayerBytes(kept, attended + dense), LayerBytes(activated + output, 0)
    # Gradients of the widest activations exist at the same time.
    widest = routed if workload.is_moe else arch.ffn_hidden_size * neurons * tokens
    return LayerBytes(attended + moe, attended + dense), LayerBytes(widest, 0)


def _expert_bytes(workload: Workload, mapping: Mapping, tokens: float) -> tuple[float, float]:
    """Return the activation bytes of a rank's experts, and the part of the activation function."""
    if not workload.is_moe:
        return 0, 0
    arch, folding, factor = workload.arch, mapping.folding, workload.factor_bytes
    capacity = workload.upcycling.moe_expert_capacity_factor
    # A rank that has all experts gets all of its tokens' assignments and no more.
    worst = UNEVEN_ROUTING if folding.expert_model_parallel_size > 1 else 1.0
    if workload.upcycling.router_dense_gradient:
        worst = 1.0  # all experts have all tokens
    uneven = min(worst, capacity or worst)
    assignments = tokens * workload.visited * uneven
    # Every expert-tensor-parallel rank has all of their tokens, and a part of the neurons.
    inputs = arch.hidden_size * factor * folding.expert_tensor_parallel_size
    neurons = workload.model.expert_width * assignments
    activated = neurons * factor
    before = arch.fc1_rows * neurons * workload.element_bytes
    router = 8 * workload.model.num_experts * tokens
    return inputs * assignments + before + activated + router, activated


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
