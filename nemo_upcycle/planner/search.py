"""Find the fastest mappings that fit: all foldings of a number of GPUs, predicted and ranked."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from nemo_upcycle.config import RECOMPUTE, ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.efficiency import CALIBRATED, Efficiency
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.memory import Memory, memory
from nemo_upcycle.planner.step_time import StepTime, mfu, step_time
from nemo_upcycle.planner.workload import Mapping, Workload
from nemo_upcycle.plans.layout import validate

SIZES = (1, 2, 4, 8, 16)
MICRO_BATCH_SIZES = (1, 2, 4)

HEADROOM = 0.94
"""Fraction of a GPU's memory that a mapping may fill. With this fraction the prediction agrees with
all published runs on whether they fit."""


Allowed = Callable[[Mapping], bool]


def everything(mapping: Mapping) -> bool:
    """Allow any mapping."""
    return True


@dataclass(frozen=True)
class Prediction:
    """A mapping, and what it will take.

    Attributes:
        workload: Model and batch.
        mapping: The parallel mapping.
        hardware: The GPUs.
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
        """Whether the mapping fits into a GPU's memory."""
        return self.memory.total <= room(self.hardware)

    @cached_property
    def even_seconds(self) -> float:
        """Seconds per step if tokens were spread evenly over the experts."""
        return step_time(self.workload, self.mapping, self.hardware, CALIBRATED.even).total

    @cached_property
    def mfu(self) -> float:
        """Model-FLOPs utilisation with causal attention."""
        return mfu(self.workload, self.mapping, self.hardware, self.time.total)

    @property
    def mfu_full_attention(self) -> float:
        """The same in the convention of arXiv 2412.09952."""
        flops = self.workload.flops
        return self.mfu * flops.training_full_attention / flops.training

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole job."""
        return self.workload.seq_length * self.workload.global_batch_size / self.time.total


def room(hardware: Hardware) -> float:
    """Return the bytes per GPU that a mapping may fill."""
    return HEADROOM * hardware.memory_gib * 2**30


def predict(
    workload: Workload,
    mapping: Mapping,
    hardware: Hardware,
    efficiency: Efficiency = CALIBRATED,
) -> Prediction:
    """Predict memory and step time of a mapping.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping.
        hardware: The GPUs.
        efficiency: Fractions of the data sheet that training reaches.

    Raises:
        UpcyclingError: The mapping does not fit the model, or the batch does not divide.
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
    """Return whether experts are not folded: ETP equals TP, and EP is a part of DP."""
    folding = mapping.folding
    return (
        folding.expert_tensor_parallel_size == folding.tensor_model_parallel_size
        and mapping.data_parallel % folding.expert_model_parallel_size == 0
    )


def search(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed = everything,
    efficiency: Efficiency = CALIBRATED,
) -> list[Prediction]:
    """Return all mappings that fit, the fastest first, each with the least recompute that fits.

    Args:
        workload: Model and batch.
        world_size: Number of GPUs.
        hardware: The GPUs.
        allowed: Which mappings to consider.
        efficiency: Fractions of the data sheet that training reaches.
    """
    every = mappings_of(workload, world_size, hardware, allowed)
    return fitting(workload, hardware, every, efficiency)


def fitting(
    workload: Workload,
    hardware: Hardware,
    every: Iterable[list[Mapping]],
    efficiency: Efficiency = CALIBRATED,
) -> list[Prediction]:
    """Return the mappings that fit, the fastest first, each with the least recompute."""
    predictions = []
    for mappings in every:
        for mapping in mappings:
            used = memory(workload, mapping)
            if used.total <= room(hardware):
                time = step_time(workload, mapping, hardware, efficiency)
                predictions.append(Prediction(workload, mapping, hardware, used, time))
                break
    return sorted(predictions, key=lambda prediction: prediction.time.total)


def least_memory(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed = everything
) -> Prediction | None:
    """Return the mapping that needs the least memory, even if the mapping does not fit."""
    every = [
        (memory(workload, mappings[-1]), mappings[-1])
        for mappings in mappings_of(workload, world_size, hardware, allowed)
    ]
    if not every:
        return None
    used, mapping = min(every, key=lambda pair: pair[0].total)
    return Prediction(workload, mapping, hardware, used, step_time(workload, mapping, hardware))


def mappings_of(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed = everything,
) -> Iterator[list[Mapping]]:
    """Yield all mappings of a model on a number of GPUs.

    Args:
        workload: Model and batch.
        world_size: Number of GPUs.
        hardware: The GPUs.
        allowed: Which mappings to consider.

    Yields:
        Groups of mappings that differ only in recompute, the least recompute first.
    """
    names = RECOMPUTE if workload.is_moe else ("none", "full")
    for folding in foldings(workload, world_size, hardware):
        for micro_batch_size in MICRO_BATCH_SIZES:
            first = Mapping(folding, world_size, micro_batch_size)
            if not _divides(first, workload) or _in_vain(first, allowed):
                continue
            mappings = (replace(first, recompute=name) for name in names)
            if wanted := list(filter(allowed, mappings)):
                yield wanted


def _divides(mapping: Mapping, workload: Workload) -> bool:
    microbatches = mapping.microbatches(workload.global_batch_size)
    virtual = mapping.folding.virtual_pipeline_model_parallel_size
    # Megatron interleaves groups of as many microbatches as there are stages.
    left = microbatches % mapping.folding.pipeline_model_parallel_size if virtual else 0
    return microbatches > 0 and left == 0


def _in_vain(mapping: Mapping, allowed: Allowed) -> bool:
    """Return whether half the context parallelism with half the microbatch is allowed too.

    That mapping makes the same pieces, with less communication.
    """
    cp = mapping.folding.context_parallel_size
    if cp == 1 or mapping.micro_batch_size == 1:
        return False
    folding = replace(mapping.folding, context_parallel_size=cp // 2)
    half = replace(mapping, folding=folding, micro_batch_size=mapping.micro_batch_size // 2)
    return any(allowed(replace(half, recompute=name)) for name in RECOMPUTE)


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
    # Megatron splits a sequence into two parts per context-parallel rank, then over TP.
    split = 2 * folding.context_parallel_size * folding.tensor_model_parallel_size
    return workload.seq_length % split == 0
