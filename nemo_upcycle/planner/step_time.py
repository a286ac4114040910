"""Time of a training step on a mapping: an analytical model of each GPU's work.

A microbatch's time on a pipeline stage is the sum of four parts: matrix multiplications, fused
attention, memory-bound operations, and collectives that do not overlap with computation.
Microbatches pass the slowest stage one after another. Filling and emptying the pipeline, gradients
and optimizer come once per step.

Source: arXiv 2104.04473 §2 (interleaved schedule), arXiv 2504.14960 §3 (what each group moves).
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import lcm
from operator import add
from statistics import NormalDist

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.families import dimensions
from nemo_upcycle.planner.efficiency import CALIBRATED, Efficiency
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.machine import Machine, distinct
from nemo_upcycle.planner.optimizer import gradient_bytes, held, update_seconds
from nemo_upcycle.planner.workload import Buffer, Mapping, Workload

ADAM_BYTES = 50
"""Bytes per parameter of an optimizer step in mixed precision: the gradient is read for its norm
(4), scaled (8), read by Adam (4) and set to zero (4); Adam reads and writes two moments and the
fp32 parameter (24); that is copied to bf16 (6)."""

LAUNCHED_AGAIN = {"moe": 7 / 6, "full": 4 / 3}
"""Kernels that the host launches with recompute over those without: the forward pass is a third of
them, the MoE half of it."""


@dataclass(frozen=True)
class StepTime:
    """Seconds per step, by use.

    Attributes:
        matrices: Matrix multiplications, including recompute.
        attention: Fused attention.
        memory_bound: Norms, activations, permutation, residuals.
        host: Waiting for the host, which launches a layer's kernels.
        tensor_parallel: All-gathers and reduce-scatters around attention and dense layers.
        expert_parallel: All-to-alls, and the collectives of expert-TP.
        context_parallel: Exchange of keys and values that does not overlap with attention.
        pipeline: Bubble, uneven stages, sending between stages.
        data_parallel: Exchange of gradients and parameters that does not overlap with a
            microbatch.
        optimizer: Adam, and copies to and from the host if offloaded.
    """

    matrices: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    host: float = 0.0
    tensor_parallel: float = 0.0
    expert_parallel: float = 0.0
    context_parallel: float = 0.0
    pipeline: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(vars(self).values())

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(*map(add, vars(self).values(), vars(other).values()))

    def __mul__(self, factor: float) -> "StepTime":
        return StepTime(*(value * factor for value in vars(self).values()))


def step_time(
    workload: Workload,
    mapping: Mapping,
    hardware: Hardware,
    efficiency: Efficiency = CALIBRATED,
) -> StepTime:
    """Return the time of a step.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping; its microbatches must divide the batch.
        hardware: The GPUs.
        efficiency: Fractions of the data sheet that training reaches.
    """
    return _Step(workload, mapping, hardware, efficiency).time()


def least_time(
    workload: Workload, mapping: Mapping, hardware: Hardware, efficiency: Efficiency = CALIBRATED
) -> float:
    """Return a lower bound of a step's seconds, in a fraction of the time that `step_time` takes.

    All microbatches pass an even share of the layers, and the pipeline fills and empties; nothing
    else takes time.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping; its microbatches must divide the batch.
        hardware: The GPUs.
        efficiency: Fractions of the data sheet that training reaches.
    """
    layers = _Step(workload, mapping, hardware, efficiency).layers
    moe = sum(workload.model.is_moe)
    dense = len(workload.model.is_moe) - moe
    seconds = layers.moe_layer.total * moe + layers.output.total
    if dense:
        seconds += layers.dense_layer.total * dense
    stages = mapping.folding.pipeline_model_parallel_size
    bubble = (stages - 1) / (mapping.folding.virtual_pipeline_model_parallel_size or 1)
    passes = mapping.microbatches(workload.global_batch_size) + bubble
    # Less by more than the error of rounding.
    return seconds / stages * passes * (1 - 1e-9)


def mfu(workload: Workload, mapping: Mapping, hardware: Hardware, seconds: float) -> float:
    """Return model-FLOPs utilisation with causal attention.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping.
        hardware: The GPUs.
        seconds: Time of a step.
    """
    work = workload.flops.training * workload.global_batch_size
    return work / (seconds * mapping.world_size * hardware.peak_tflops * 1e12)


def fullest_rank(
    workload: Workload, mapping: Mapping, hardware: Hardware, efficiency: Efficiency = CALIBRATED
) -> float:
    """Return the tokens of the fullest expert-parallel rank over the mean.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping.
        hardware: The GPUs.
        efficiency: Has the coefficient of variation of the tokens per expert.
    """
    return _Step(workload, mapping, hardware, efficiency).fullest


class _Step:
    """A step on one mapping; repeated parts are computed once."""

    def __init__(
        self, workload: Workload, mapping: Mapping, hardware: Hardware, efficiency: Efficiency
    ) -> None:
        self.workload = workload
        self.mapping = mapping
        self.machine = Machine(hardware, efficiency)
        self.efficiency = efficiency
        folding = mapping.folding
        self.tp = folding.tensor_model_parallel_size
        self.cp = folding.context_parallel_size
        self.pp = folding.pipeline_model_parallel_size
        self.ep = folding.expert_model_parallel_size
        self.etp = folding.expert_tensor_parallel_size

    def time(self) -> StepTime:
        mapping, workload = self.mapping, self.workload
        microbatches = mapping.microbatches(workload.global_batch_size)
        stages = {kind: (self.stage(*kind), count) for kind, count in self.stages.items()}
        mean = sum((time * (count / self.pp) for time, count in stages.values()), StepTime())
        slowest = max(time.total for time, _ in stages.values())
        virtual = mapping.folding.virtual_pipeline_model_parallel_size or 1
        # While the pipeline fills and empties, nothing hides what is sent.
        bubble = (self.pp - 1) * (mean.total / virtual + self.sending)
        uneven = microbatches * (slowest - mean.total)
        exposed = self.exposed_sending(mean.total)
        waiting = microbatches * exposed
        # What is sent hides behind a stage, and gradients behind both: behind the stage alone,
        # a faster stage would make the step slower.
        once = self.gradients(mean.total + exposed) + self.optimizer()
        return mean * microbatches + StepTime(pipeline=bubble + uneven + waiting) + once

    @property
    def stages(self) -> Counter[tuple[int, int, bool]]:
        """Number of stages per (MoE layers, dense layers, has the output layer)."""
        layers = self.workload.stages(self.mapping.folding)
        return Counter((moe, dense, n == self.pp - 1) for n, (moe, dense) in enumerate(layers))

    def stage(self, moe_layers: int, dense_layers: int, has_output: bool) -> StepTime:
        """Return the time of a microbatch in a stage, forward and backward."""
        layers = self.layers
        time = layers.moe_layer * moe_layers
        if dense_layers:
            time += layers.dense_layer * dense_layers
        if has_output:
            time += layers.output
        return time

    # --- Layers ----------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> "_Step":
        """A step with the same layers, which are computed once for all numbers of stages."""
        one = self.mapping
        sizes = self.tp, self.cp, self.ep, self.etp, one.micro_batch_size, one.recompute
        return _same_layers(self.workload, self.machine, *sizes)

    @cached_property
    def tokens(self) -> float:
        """Tokens per microbatch on a GPU between the layers."""
        return self.mapping.tokens(self.workload.seq_length)

    @cached_property
    def moe_layer(self) -> StepTime:
        if not self.workload.is_moe:
            return StepTime()
        experts = self.experts
        if shared := self.workload.model.shared_width:
            experts += self.feed_forward(shared)
        layer = self._both_ways(self.around_attention, experts, self.mapping.recompute)
        return layer + StepTime(host=max(0.0, self.launching - layer.total))

    @property
    def launching(self) -> float:
        """Seconds that the host takes for an MoE layer, forward and backward."""
        upcycling, efficiency = self.workload.upcycling, self.efficiency
        local = self.workload.model.num_experts // self.ep
        seconds = efficiency.host_layer + efficiency.host_expert * local
        # Neither padding to a capacity nor DeepEP needs the counts on the host.
        padded = upcycling.moe_pad_expert_input_to_capacity
        if not padded and upcycling.moe_token_dispatcher_type != "flex":
            seconds += efficiency.host_sync
        return (
            seconds
            * LAUNCHED_AGAIN.get(self.mapping.recompute, 1.0)
            * self.machine.hardware.host_slowness
        )

    @cached_property
    def dense_layer(self) -> StepTime:
        recompute = "full" if self.mapping.recompute == "full" else "none"
        width = self.workload.arch.ffn_hidden_size
        feed_forward = self.feed_forward(width) + self.gather_sequence
        return self._both_ways(self.around_attention, feed_forward, recompute)

    def _both_ways(self, first: StepTime, second: StepTime, recompute: str) -> StepTime:
        """Return forward and backward of a layer, including recompute."""
        forward = first + second + self.core_attention(1.0)
        # Each multiplication has two gradients; a collective's backward is the mirror collective.
        backward = StepTime(
            *(
                value * (1 if name.endswith("_parallel") else 2)
                for name, value in vars(first + second).items()
            )
        )
        time = forward + backward + self.core_attention(2.5)
        match recompute:
            case "full":
                return time + forward
            case "moe":
                return time + second
            case "moe_act":
                return time + StepTime(memory_bound=second.memory_bound / 3)
            case "norm_act":
                return time + StepTime(memory_bound=second.memory_bound / 3) + self.norm
        return time

    @cached_property
    def around_attention(self) -> StepTime:
        """Projections, norms, rotary embedding and residuals, forward."""
        arch, sizes = self.workload.arch, dimensions(self.workload.arch)
        tokens, hidden = self.tokens * self.tp, arch.hidden_size
        products = self.product(tokens, sizes["qkv"] // self.tp, hidden)
        products += self.product(tokens, hidden, sizes["queries"] // self.tp)
        # Two norms, two residuals, the rotary embedding: elements read and written.
        elements = (2 * 2 + 2 * 3) * hidden + 2 * (sizes["queries"] + sizes["keys"])
        return (
            StepTime(memory_bound=self.moved(elements * self.tokens))
            + products
            + self.gather_sequence
        )

    def product(self, m: float, n: float, k: float) -> StepTime:
        """Return a layer's product of m×k by k×n, with the way to FP8 if there is one."""
        seconds, part = self.machine.product(m, n, k), self.workload.fp8_layers
        # Values are read in bf16, and written in FP8 by rows and by columns.
        cast = self.machine.moved(4 * m * k * part)
        faster = 1 - part + part / self.efficiency.fp8
        return StepTime(matrices=seconds * faster, memory_bound=cast)

    @cached_property
    def norm(self) -> StepTime:
        """The norm in front of a feed-forward layer, forward."""
        return StepTime(memory_bound=self.moved(2 * self.workload.arch.hidden_size * self.tokens))

    def core_attention(self, factor: float) -> StepTime:
        """Return fused attention, `factor` times the forward operations; KV circulate meanwhile."""
        arch, each = self.workload.arch, self.workload.element_bytes
        sequences = self.mapping.micro_batch_size / (self.tp * self.cp)
        work = self.workload.flops.causal_attention / arch.num_layers * sequences * factor
        seconds = self.machine.attention(work)
        if self.cp == 1:
            return StepTime(attention=seconds)
        keys = 2 * dimensions(arch)["keys"] * each * self.tokens * (self.cp - 1)
        moved = self.machine.collective(keys * (1 if factor == 1 else 2), self.tp, self.cp)
        exposed = max(0.0, moved - seconds) + self.efficiency.latency * (self.cp - 1)
        return StepTime(attention=seconds, context_parallel=exposed)

    def moved(self, elements: float) -> float:
        """Return the time to read or write `elements` activations."""
        return self.machine.moved(elements * self.workload.element_bytes)

    def feed_forward(self, neurons: int) -> StepTime:
        """A dense feed-forward layer or shared expert, forward, without its collectives."""
        arch = self.workload.arch
        tokens, width = self.tokens * self.tp, neurons // self.tp
        products = self.product(tokens, arch.fc1_rows * width, arch.hidden_size)
        products += self.product(tokens, arch.hidden_size, width)
        moved = self.moved((arch.fc1_rows + 1) * neurons * self.tokens)
        return products + StepTime(memory_bound=moved)

    @cached_property
    def experts(self) -> StepTime:
        """Routing, sending tokens, and the experts of the fullest rank, forward."""
        workload, arch = self.workload, self.workload.arch
        hidden, width = arch.hidden_size, workload.model.expert_width // self.etp
        local = workload.model.num_experts // self.ep
        assignments = self.tokens * workload.model.topk * self.fullest
        received = assignments * self.etp
        each = received / local
        products = self.product(each, arch.fc1_rows * width, hidden) * local
        products += self.product(each, hidden, width) * local
        sorted_by_expert = 2 if local > 1 and self.ep * self.etp > 1 else 1
        # Permute and back, sort by expert and back, activate.
        elements = 4 * hidden * assignments
        elements += 4 * hidden * received * (sorted_by_expert - 1)
        elements += (arch.fc1_rows + 1) * width * received
        return products + StepTime(
            memory_bound=self.moved(elements),
            expert_parallel=2 * self.dispatch(hidden * workload.element_bytes),
        )

    @cached_property
    def fullest(self) -> float:
        """Tokens of the fullest expert-parallel rank over the mean."""
        upcycling, workload = self.workload.upcycling, self.workload
        capacity = upcycling.moe_expert_capacity_factor
        if capacity is not None and upcycling.moe_pad_expert_input_to_capacity:
            return capacity
        # Shards of one copy of the dense layer are chosen together; copies independently.
        copies = max(1.0, workload.model.num_experts / upcycling.granularity / self.ep)
        # Blom's formula for the expected maximum of normal values.
        largest = NormalDist().inv_cdf((self.ep - 0.375) / (self.ep + 0.25))
        uneven = max(0.0, largest) * self.efficiency.expert_load_cv / copies**0.5
        return 1 + uneven if capacity is None else min(capacity, 1 + uneven)

    @cached_property
    def output(self) -> StepTime:
        """The output layer and the loss, forward and backward."""
        arch = self.workload.arch
        tokens = self.tokens * self.tp
        product = self.machine.product(tokens, arch.vocab_size // self.tp, arch.hidden_size)
        return (
            StepTime(
                matrices=3 * product, memory_bound=self.moved(12 * arch.vocab_size * self.tokens)
            )
            + self.gather_sequence
        )

    # --- Collectives -----------------------------------------------------------------------------

    @cached_property
    def gather_sequence(self) -> StepTime:
        """All-gather before and reduce-scatter after a tensor-parallel block."""
        if self.tp == 1:
            return StepTime()
        hidden = self.workload.arch.hidden_size * self.workload.element_bytes
        sent = hidden * self.tokens * (self.tp - 1)
        return StepTime(tensor_parallel=2 * self.machine.collective(sent, 1, self.tp))

    def dispatch(self, each: float) -> float:
        """Return the time to send tokens to their experts; the way back takes as long.

        Args:
            each: Bytes of a token.
        """
        machine, topk = self.machine, self.workload.model.topk
        match self.workload.upcycling.moe_token_dispatcher_type:
            case "allgather":
                ranks = self.etp * self.ep
                return machine.collective(each * self.tokens * (ranks - 1), 1, ranks)
            case "flex":
                # A token goes once to each rank, and once to each node, that has its experts.
                sent = each * self.tokens * self.fullest
                return machine.deduplicated(sent, topk, self.etp, self.ep) + self.gather_experts(
                    sent * distinct(self.ep, topk)
                )
        sent = each * self.tokens * topk * self.fullest
        return machine.all_to_all(sent, self.etp, self.ep) + self.gather_experts(sent)

    def gather_experts(self, sent: float) -> float:
        """Return the time of an all-gather over expert-TP.

        Args:
            sent: Bytes of a GPU's tokens, as often as they are sent.
        """
        return self.machine.collective(sent * (self.etp - 1), 1, self.etp)

    @cached_property
    def sending(self) -> float:
        """Seconds to send a microbatch's activations to the next stage, and gradients back."""
        if self.pp == 1:
            return 0.0
        size = self.workload.arch.hidden_size * self.workload.element_bytes * self.tokens
        stride = self.mapping.world_size // self.pp
        return 2 * self.machine.collective(size, stride, 2)

    def exposed_sending(self, stage: float) -> float:
        """Return the seconds per microbatch of sending that computation does not hide.

        Interleaved stages send one chunk while the next is computed; other stages wait.

        Args:
            stage: Seconds of a microbatch in a stage.
        """
        virtual = self.mapping.folding.virtual_pipeline_model_parallel_size
        if virtual is None:
            return self.sending
        return max(0.0, virtual * self.sending - stage)

    def gradients(self, microbatch: float) -> StepTime:
        """Return the time of gradient and parameter exchange that a microbatch does not overlap."""
        reduced = gathered = 0.0
        for buffer, count in Counter(self.buffers).items():
            ranks, stride = self.mapping.replicas(buffer)
            share = buffer.elements * (ranks - 1) / ranks
            each = self.workload.element_bytes
            reduced += count * self.machine.collective(
                gradient_bytes(self.workload) * share, stride, ranks
            )
            gathered += count * self.machine.collective(each * share, stride, ranks)
        forward = microbatch / 3
        exposed = max(0.0, reduced - 2 * forward) + max(0.0, gathered - forward)
        return StepTime(data_parallel=exposed)

    def optimizer(self) -> StepTime:
        """Return Adam's pass over this rank's part of the state."""
        on_gpu = self.machine.moved(held(self.workload, self.mapping) * ADAM_BYTES)
        hardware = self.machine.hardware
        return StepTime(optimizer=update_seconds(self.workload, self.mapping, hardware, on_gpu))

    @cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """Parameters of the first stage, which has the embedding."""
        return self.workload.buffers(self.mapping.folding, 0)


@lru_cache(maxsize=4096)
def _same_layers(
    workload: Workload,
    machine: Machine,
    tp: int,
    cp: int,
    ep: int,
    etp: int,
    micro_batch_size: int,
    recompute: str,
) -> _Step:
    """Return a step with one pipeline stage, to take its layers from."""
    folding = ParallelFolding.of(tp=tp, cp=cp, ep=ep, etp=etp)
    mapping = Mapping(folding, lcm(tp * cp, ep * etp), micro_batch_size, recompute)
    return _Step(workload, mapping, machine.hardware, machine.efficiency)
