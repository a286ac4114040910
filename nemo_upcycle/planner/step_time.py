"""Time of a training step on a mapping: an analytical model of each GPU's work.

A microbatch's time on a pipeline stage is the sum of the stage's layers (`layer_time.py`).
Microbatches pass the slowest stage one after another. Filling and emptying the pipeline, gradients
and optimizer come once per step.

Source: arXiv 2104.04473 §2 (interleaved schedule).
"""

from collections import Counter
from functools import cached_property, lru_cache
from typing import NamedTuple

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.planner.efficiency import CALIBRATED, Efficiency
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.layer_time import StepTime, layers_of
from nemo_upcycle.planner.machine import Machine
from nemo_upcycle.planner.optimizer import gradient_bytes, held, update_seconds
from nemo_upcycle.planner.workload import Mapping, Workload

ADAM_BYTES = 50
"""Bytes per parameter of an optimizer step in mixed precision: the gradient is read for its norm
(4), scaled (8), read by Adam (4) and set to zero (4); Adam reads and writes two moments and the
fp32 parameter (24); that is copied to bf16 (6)."""


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
    layers = layers_of(workload, mapping, Machine(hardware, efficiency))
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
    """Return model-FLOPs utilization with causal attention.

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
    return layers_of(workload, mapping, Machine(hardware, efficiency)).fullest


class _Step:
    """A step on one mapping; repeated parts are computed once."""

    def __init__(
        self, workload: Workload, mapping: Mapping, hardware: Hardware, efficiency: Efficiency
    ) -> None:
        self.workload = workload
        self.mapping = mapping
        self.machine = Machine(hardware, efficiency)
        self.pp = mapping.folding.pipeline_model_parallel_size
        self.layers = layers_of(workload, mapping, self.machine)

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
        # What is sent hides behind the stage that sets the pace. Gradients hide behind a stage and
        # what is sent: behind the stage alone, a faster stage would make the step slower.
        exposed = self.exposed_sending(slowest)
        waiting = microbatches * exposed
        once = self.once(mean.total + exposed)
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

    @cached_property
    def sending(self) -> float:
        """Seconds to send a microbatch's activations to the next stage, and gradients back."""
        if self.pp == 1:
            return 0.0
        size = self.workload.arch.hidden_size * self.workload.element_bytes * self.layers.tokens
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

    def once(self, microbatch: float) -> StepTime:
        """Return what comes once per step: Adam, and exchanges that no microbatch overlaps.

        Args:
            microbatch: Seconds of a microbatch.
        """
        world_size = self.mapping.world_size
        state = _state_times(self.workload, self.mapping.folding, world_size, self.machine)
        forward = microbatch / 3
        exposed = max(0.0, state.reduced - 2 * forward) + max(0.0, state.gathered - forward)
        return StepTime(data_parallel=exposed, optimizer=state.optimizer)


class _StateTimes(NamedTuple):
    """Seconds to reduce the gradients, to gather the parameters, and to update them."""

    reduced: float
    gathered: float
    optimizer: float


@lru_cache(maxsize=16)
def _state_times(
    workload: Workload, folding: ParallelFolding, world_size: int, machine: Machine
) -> _StateTimes:
    """Return times that neither the microbatch nor recompute changes.

    The first stage is looked at, which has the embedding.
    """
    mapping = Mapping(folding, world_size)
    reduced = gathered = 0.0
    for buffer, count in workload.buffers(folding, 0).items():
        ranks, stride = mapping.replicas(buffer)
        share = buffer.elements * (ranks - 1) / ranks
        gradients, parameters = gradient_bytes(workload), workload.element_bytes
        reduced += count * machine.collective(gradients * share, stride, ranks)
        gathered += count * machine.collective(parameters * share, stride, ranks)
    on_gpu = machine.moved(held(workload, mapping) * ADAM_BYTES)
    return _StateTimes(
        reduced, gathered, update_seconds(workload, mapping, machine.hardware, on_gpu)
    )
