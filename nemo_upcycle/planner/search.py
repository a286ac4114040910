"""Find the fastest mappings that fit: all foldings of a number of GPUs, predicted and ranked."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.efficiency import CALIBRATED, Efficiency
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.layer_time import StepTime
from nemo_upcycle.planner.memory import RESERVED, Memory, memory
from nemo_upcycle.planner.nodes import of_job
from nemo_upcycle.planner.space import Allowed, everything, mappings_of
from nemo_upcycle.planner.step_time import least_time, mfu, step_time
from nemo_upcycle.planner.workload import Mapping, Workload
from nemo_upcycle.plans.layout import validate

HEADROOM = 0.94
"""Fraction of a GPU's memory that a mapping may fill. With this fraction the prediction agrees with
all published runs on whether they fit."""


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
        """Model-FLOPs utilization with causal attention."""
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
    used = of_job(hardware, world_size)
    every = mappings_of(workload, world_size, used, allowed)
    return fitting(workload, used, every, efficiency)


@dataclass(frozen=True)
class Examined:
    """Mappings whose memory is known.

    Attributes:
        fitting: The mappings that fit, the fastest first, each with the least recompute.
        too_large: The other mappings with the least recompute, and their memory.
    """

    fitting: list[Prediction]
    too_large: list[tuple[Mapping, Memory]]


def examined(
    workload: Workload,
    hardware: Hardware,
    every: Iterable[list[Mapping]],
    efficiency: Efficiency = CALIBRATED,
) -> Examined:
    """Predict the memory of mappings, and the step time of those that fit.

    Args:
        workload: Model and batch.
        hardware: The GPUs, with the nodes of the job.
        every: Groups of mappings that differ in recompute, the least recompute first.
        efficiency: Fractions of the data sheet that training reaches.
    """
    predictions, too_large, limit = [], [], room(hardware)
    for mappings in every:
        for number, mapping in enumerate(mappings):
            used = memory(workload, mapping)
            if used.total <= limit:
                time = step_time(workload, mapping, hardware, efficiency)
                predictions.append(Prediction(workload, mapping, hardware, used, time))
                break
            if number == 0:
                too_large.append((mapping, used))
    predictions.sort(key=lambda prediction: prediction.time.total)
    return Examined(predictions, too_large)


def fitting(
    workload: Workload,
    hardware: Hardware,
    every: Iterable[list[Mapping]],
    efficiency: Efficiency = CALIBRATED,
) -> list[Prediction]:
    """Return the mappings that fit, the fastest first, each with the least recompute."""
    return examined(workload, hardware, every, efficiency).fitting


def fastest(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed = everything
) -> Prediction | None:
    """Return the first mapping of `search` in less time; None if none fits.

    Mappings are looked at in the order of a lower bound of their time, until no other is faster.
    """
    used = of_job(hardware, world_size)
    bounds = [
        (least_time(workload, mappings[0], used), number, mappings)
        for number, mappings in enumerate(mappings_of(workload, world_size, used, allowed))
    ]
    found: list[tuple[float, int, Prediction]] = []
    for bound, number, mappings in sorted(bounds, key=itemgetter(0)):
        if found and bound > found[0][0]:
            break
        for one in fitting(workload, used, [mappings]):
            # As in `search`, the first of equally fast mappings.
            found = [min([*found, (one.time.total, number, one)], key=itemgetter(0, 1))]
    return found[0][2] if found else None


def any_fits(workload: Workload, hardware: Hardware, every: Iterable[list[Mapping]]) -> bool:
    """Return whether a mapping fits, with as much recompute as there is.

    Args:
        workload: Model and batch.
        hardware: The GPUs.
        every: Groups of mappings that differ in recompute, the most recompute last.
    """
    limit = room(hardware)
    return limit >= RESERVED and any(
        memory(workload, mappings[-1]).total <= limit for mappings in every
    )


def least_memory(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed = everything
) -> Prediction | None:
    """Return the mapping that needs the least memory, even if the mapping does not fit."""
    used = of_job(hardware, world_size)
    every = list(mappings_of(workload, world_size, used, allowed))
    return least_of(workload, used, every) if every else None


def least_of(workload: Workload, hardware: Hardware, every: Iterable[list[Mapping]]) -> Prediction:
    """Return the mapping that needs the least memory, of one group or more.

    Args:
        workload: Model and batch.
        hardware: The GPUs, with the nodes of the job.
        every: Groups of mappings that differ in recompute, the most recompute last.
    """
    needs = ((memory(workload, mappings[-1]), mappings[-1]) for mappings in every)
    needed, mapping = min(needs, key=lambda pair: pair[0].total)
    return Prediction(workload, mapping, hardware, needed, step_time(workload, mapping, hardware))
