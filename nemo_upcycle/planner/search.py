"""Find the fastest mappings that fit: all foldings of a number of GPUs, predicted and ranked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from nemo_upcycle.config import RECOMPUTE, ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.layout import validate
from nemo_upcycle.planner.efficiency import CALIBRATED, Efficiency
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.memory import Memory, memory
from nemo_upcycle.planner.step_time import StepTime, mfu, step_time
from nemo_upcycle.planner.workload import Mapping, Workload

SIZES = (1, 2, 4, 8, 16)
MICRO_BATCH_SIZES = (1, 2, 4)

HEADROOM = 0.94
"""Part of a GPU's memory that a mapping may fill. With it no published run that did not fit fits,
and all that ran do."""


@dataclass(frozen=True)
class Prediction:
    """A mapping, and what it will take.

    Attributes:
        workload: What is trained.
        mapping: How.
        hardware: On what.
        memory: Of the fullest GPU.
        time: Of a step.
    """

    workload: Workload
    mapping: Mapping
    hardware: Hardware
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        return _fits(self.memory, self.hardware)

    @cached_property
    def mfu(self) -> float:
        """Model-FLOPs utilisation, attention causal."""
        return mfu(self.workload, self.mapping, self.hardware, self.time.total)

    @property
    def mfu_full_attention(self) -> float:
        """The same in the convention of arXiv 2412.09952."""
        flops = self.workload.flops
        return self.mfu * flops.training_full_attention / flops.training

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the whole job a second."""
        return self.workload.seq_length * self.workload.global_batch_size / self.time.total


def _fits(used: Memory, hardware: Hardware) -> bool:
    return used.total <= HEADROOM * hardware.memory_gib * 2**30


def predict(
    workload: Workload,
    mapping: Mapping,
    hardware: Hardware,
    efficiency: Efficiency = CALIBRATED,
) -> Prediction:
    """Predict memory and step time of a mapping.

    Args:
        workload: What is trained.
        mapping: How.
        hardware: On what.
        efficiency: How much of it a training gets.

    Raises:
        UpcyclingError: The model cannot be spread so, or the batch does not divide.
    """
    validate(workload.arch, workload.upcycling, mapping.folding, mapping.world_size)
    batch = workload.global_batch_size
    if not mapping.microbatches(batch):
        raise UpcyclingError(
            f"A global batch of {batch} does not divide by DP · micro_batch_size = "
            f"{mapping.data_parallel} · {mapping.micro_batch_size}; use a multiple of "
            f"{mapping.data_parallel * mapping.micro_batch_size}, or other sizes."
        )
    return Prediction(
        workload,
        mapping,
        hardware,
        memory(workload, mapping),
        step_time(workload, mapping, hardware, efficiency),
    )


def unfolded(mapping: Mapping) -> bool:
    """Say whether experts are spread as before folding: ETP is TP, and EP a part of DP."""
    folding = mapping.folding
    return (
        folding.expert_tensor_parallel_size == folding.tensor_model_parallel_size
        and mapping.data_parallel % folding.expert_model_parallel_size == 0
    )


def search(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Callable[[Mapping], bool] = lambda mapping: True,
    efficiency: Efficiency = CALIBRATED,
    fsdp: bool = False,
) -> list[Prediction]:
    """Return all mappings that fit, the fastest first, each with the least recompute that fits.

    Args:
        workload: What is trained.
        world_size: GPUs.
        hardware: Their kind.
        allowed: Which mappings to look at.
        efficiency: How much of the hardware a training gets.
        fsdp: Look at FSDP instead: data parallelism, with expert parallelism or without.
    """
    found = []
    for mappings in mappings_of(workload, world_size, hardware, fsdp):
        for mapping in mappings:  # the least recompute first
            if not allowed(mapping):
                continue
            used = memory(workload, mapping)
            if _fits(used, hardware):
                time = step_time(workload, mapping, hardware, efficiency)
                found.append(Prediction(workload, mapping, hardware, used, time))
                break
    return sorted(found, key=lambda prediction: prediction.time.total)


def least_memory(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Callable[[Mapping], bool] = lambda mapping: True,
) -> Prediction | None:
    """Return the mapping that takes the least memory, whether it fits or not."""
    every = [
        (memory(workload, mapping), mapping)
        for mappings in mappings_of(workload, world_size, hardware)
        for mapping in list(filter(allowed, mappings))[-1:]
    ]
    if not every:
        return None
    used, mapping = min(every, key=lambda pair: pair[0].total)
    return Prediction(workload, mapping, hardware, used, step_time(workload, mapping, hardware))


def mappings_of(
    workload: Workload, world_size: int, hardware: Hardware, fsdp: bool = False
) -> Iterator[Iterator[Mapping]]:
    """Yield all mappings of a model on so many GPUs; those that differ in recompute together."""
    for folding in foldings(workload, world_size, hardware):
        sizes = vars(folding) | {"expert_model_parallel_size": 1}
        if fsdp and ParallelFolding(**sizes) != ParallelFolding():
            continue
        # Splitting larger microbatches over CP gives the same pieces, and more to exchange.
        for micro_batch_size in MICRO_BATCH_SIZES if folding.context_parallel_size == 1 else (1,):
            first = Mapping(folding, world_size, micro_batch_size)
            microbatches = first.microbatches(workload.global_batch_size)
            virtual = folding.virtual_pipeline_model_parallel_size
            stages = folding.pipeline_model_parallel_size
            # Megatron interleaves groups of as many microbatches as there are stages.
            if not microbatches or (virtual and microbatches % stages):
                continue
            names = RECOMPUTE if workload.is_moe else ("none", "full")
            yield (Mapping(folding, world_size, micro_batch_size, name, fsdp) for name in names)


def foldings(workload: Workload, world_size: int, hardware: Hardware) -> Iterator[ParallelFolding]:
    """Yield all even foldings of a model; tensor parallelism stays inside an NVLink domain."""
    layers, experts = workload.arch.num_layers, workload.upcycling.num_moe_experts or 1
    inside = [size for size in SIZES if size <= hardware.nvlink_domain]
    stages = [
        size for size in range(1, layers + 1) if layers % size == 0 and world_size % size == 0
    ]
    expert_parallel = [size for size in range(1, experts + 1) if experts % size == 0]
    expert_tensor = inside if workload.is_moe else [1]
    for tp, cp, pp, ep, etp in product(inside, inside, stages, expert_parallel, expert_tensor):
        if world_size % (tp * cp * pp) or world_size % (etp * ep * pp):
            continue
        for virtual in range(1, layers // pp + 1):
            if (layers // pp) % virtual or (virtual > 1 and pp == 1):
                continue
            vpp = virtual if virtual > 1 else None
            folding = ParallelFolding.of(tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp)
            if _fits_model(workload, folding, world_size):
                yield folding


def _fits_model(workload: Workload, folding: ParallelFolding, world_size: int) -> bool:
    try:
        validate(workload.arch, workload.upcycling, folding, world_size)
    except UpcyclingError:
        return False
    # Megatron splits a sequence into two parts for each context-parallel rank, then over TP.
    split = 2 * folding.context_parallel_size * folding.tensor_model_parallel_size
    return workload.seq_length % split == 0
