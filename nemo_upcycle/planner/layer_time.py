"""Time of a layer's microbatch on a GPU: matrix products, attention, memory traffic, collectives.

Source: arXiv 2504.14960 §3 (what each group moves).
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import add, mul
from statistics import NormalDist
from typing import NamedTuple

from nemo_upcycle.families import dimensions
from nemo_upcycle.planner.machine import Machine, distinct
from nemo_upcycle.planner.workload import Mapping, Workload

LAUNCHED_AGAIN = {"moe": 7 / 6, "full": 4 / 3}
"""Kernels that the host launches with recompute over those without: the forward pass is a third of
them, the MoE half of it."""


class StepTime(NamedTuple):
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
        return sum(self)

    def __add__(self, other: "StepTime") -> "StepTime":  # type: ignore[override]
        return StepTime(*map(add, self, other))

    def __mul__(self, factor: float) -> "StepTime":  # type: ignore[override]
        return StepTime(*[value * factor for value in self])

    def __rmul__(self, factor: float) -> "StepTime":  # type: ignore[override]
        return self * factor


BACKWARD = tuple(1 if name.endswith("_parallel") else 2 for name in StepTime._fields)
"""Backward over forward: a product has two gradients, a collective has the mirror collective."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model, cut and recomputed in one way; each time is computed once.

    Attributes:
        workload: Model and batch.
        machine: The GPUs.
        tp: Tensor parallelism.
        cp: Context parallelism.
        ep: Expert parallelism.
        etp: Expert tensor parallelism.
        micro_batch_size: Sequences of a microbatch.
        recompute: A key of `config.RECOMPUTE`.
    """

    workload: Workload
    machine: Machine
    tp: int
    cp: int
    ep: int
    etp: int
    micro_batch_size: int
    recompute: str

    @cached_property
    def tokens(self) -> float:
        """Tokens per microbatch on a GPU between the layers."""
        return self.workload.seq_length * self.micro_batch_size / (self.tp * self.cp)

    @cached_property
    def moe_layer(self) -> StepTime:
        if not self.workload.is_moe:
            return StepTime()
        experts = self.experts
        if shared := self.workload.model.shared_width:
            experts += self.feed_forward(shared)
        layer = self._both_ways(self.around_attention, experts, self.recompute)
        return layer + StepTime(host=max(0.0, self.launching - layer.total))

    @property
    def launching(self) -> float:
        """Seconds that the host takes for an MoE layer, forward and backward."""
        upcycling, efficiency = self.workload.upcycling, self.machine.efficiency
        local = self.workload.model.num_experts // self.ep
        seconds = efficiency.host_layer + efficiency.host_expert * local
        # Neither padding to a capacity nor DeepEP needs the counts on the host.
        padded = upcycling.moe_pad_expert_input_to_capacity
        if not padded and upcycling.moe_token_dispatcher_type != "flex":
            seconds += efficiency.host_sync
        return (
            seconds * LAUNCHED_AGAIN.get(self.recompute, 1.0) * self.machine.hardware.host_slowness
        )

    @cached_property
    def dense_layer(self) -> StepTime:
        recompute = "full" if self.recompute == "full" else "none"
        width = self.workload.arch.ffn_hidden_size
        feed_forward = self.feed_forward(width) + self.gather_sequence
        return self._both_ways(self.around_attention, feed_forward, recompute)

    def _both_ways(self, first: StepTime, second: StepTime, recompute: str) -> StepTime:
        """Return forward and backward of a layer, including recompute."""
        forward = first + second + self.core_attention(1.0)
        backward = StepTime(*map(mul, first + second, BACKWARD))
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
        faster = 1 - part + part / self.machine.efficiency.fp8
        return StepTime(matrices=seconds * faster, memory_bound=cast)

    @cached_property
    def norm(self) -> StepTime:
        """The norm in front of a feed-forward layer, forward."""
        return StepTime(memory_bound=self.moved(2 * self.workload.arch.hidden_size * self.tokens))

    def core_attention(self, factor: float) -> StepTime:
        """Return fused attention, `factor` times the forward operations; KV circulate meanwhile."""
        arch, each = self.workload.arch, self.workload.element_bytes
        sequences = self.micro_batch_size / (self.tp * self.cp)
        work = self.workload.flops.causal_attention / arch.num_layers * sequences * factor
        seconds = self.machine.attention(work)
        if self.cp == 1:
            return StepTime(attention=seconds)
        keys = 2 * dimensions(arch)["keys"] * each * self.tokens * (self.cp - 1)
        moved = self.machine.collective(keys * (1 if factor == 1 else 2), self.tp, self.cp)
        exposed = max(0.0, moved - seconds) + self.machine.efficiency.latency * (self.cp - 1)
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
        assignments = self.tokens * workload.visited * self.fullest
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
        if self.workload.upcycling.router_dense_gradient:
            return 1.0
        upcycling, workload = self.workload.upcycling, self.workload
        capacity = upcycling.moe_expert_capacity_factor
        if capacity is not None and upcycling.moe_pad_expert_input_to_capacity:
            return capacity
        # Shards of one copy of the dense layer are chosen together; copies independently.
        copies = max(1.0, workload.model.num_experts / upcycling.granularity / self.ep)
        # Blom's formula for the expected maximum of normal values.
        largest = NormalDist().inv_cdf((self.ep - 0.375) / (self.ep + 0.25))
        uneven = max(0.0, largest) * self.machine.efficiency.expert_load_cv / copies**0.5
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
        machine, topk = self.machine, self.workload.visited
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


def layers_of(workload: Workload, mapping: Mapping, machine: Machine) -> Layers:
    """Return the layers of a mapping; mappings that differ in stages share them.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping.
        machine: The GPUs.
    """
    folding = mapping.folding
    return _layers(
        workload,
        machine,
        folding.tensor_model_parallel_size,
        folding.context_parallel_size,
        folding.expert_model_parallel_size,
        folding.expert_tensor_parallel_size,
        mapping.micro_batch_size,
        mapping.recompute,
    )


_layers = lru_cache(maxsize=4096)(Layers)
