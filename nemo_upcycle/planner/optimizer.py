"""Bytes and time of Adam's state: in fp32 or less, on the GPUs or in the host's memory.

Counted as Megatron-Core 0.15.3 and Transformer Engine 2.9 keep the state, read in their code:
`DistributedOptimizer`, `HybridDeviceOptimizer`, `FusedAdam`. Bytes are per parameter of a rank's
part of the state, unless stated otherwise.
"""

from nemo_upcycle.config import PRECISIONS
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.workload import Mapping, Workload

HOST_BYTES = 16
"""Host memory of an offloaded parameter: fp32 parameter, gradient, and two moments."""

HOST_TRAFFIC = 40
"""Host memory traffic of an offloaded parameter. Adam reads four fp32 values and writes three. The
gradient arrives (4). The new parameter is read, written in bf16, copied to a pinned buffer and sent
(4 + 2 + 2), less what stays in caches."""

HOST_MEMORY = 0.5
"""Fraction of the host's memory bandwidth that Adam on the CPUs reaches. Assumed, not measured."""

PINNED, PAGEABLE = 0.8, 0.2
"""Fractions of the link's bandwidth for copies from pinned and from pageable host memory: gradients
arrive in pinned memory, parameters leave from pageable memory. Assumed; deepspeedai/DeepSpeed#5301
reports that pinned memory made the same copies 4 to 6 times as fast."""

HOST_ROOM = 0.8
"""Fraction of a node's memory for the state: the rest is for the operating system, data loading and
rounding of pinned memory."""

GATHERED_BYTES = 12
"""Host memory of a parameter while a checkpoint is saved: fp32 parameter and moments."""


def gradient_bytes(workload: Workload) -> int:
    """Return the bytes per gradient in Megatron's buffers."""
    in_bf16 = PRECISIONS[workload.precision].is_bf16 and not workload.optimizer.grad_reduce_in_fp32
    return 2 if in_bf16 else 4


def state_bytes(workload: Workload) -> float:
    """Return the bytes on the GPU: the moments, and fp32 copies of bf16 parameters."""
    if not PRECISIONS[workload.precision].is_bf16:
        return 8
    storage = workload.optimizer
    here = 1 - storage.optimizer_offload_fraction
    if here == 1:
        return 4 + 2 * storage.moment_bytes
    # HybridDeviceOptimizer also keeps fp32 copies of bf16 gradients.
    return here * (12 if storage.grad_reduce_in_fp32 else 16)


def passing_bytes(workload: Workload) -> float:
    """Return the further bytes on the GPU while Adam steps or a checkpoint is loaded.

    There are no activations then. Not counted for Megatron's default, where published peaks are
    those of steps: loading makes its moments a second time, 8 bytes.
    """
    storage = workload.optimizer
    here = 1 - storage.optimizer_offload_fraction
    if here < 1:
        # Loading makes a step with random bf16 gradients first, then copies fp32 parameters and
        # their gradients, or parameters and moments, a second time.
        return max(2 + 4 * here, 8 * here)
    if storage.is_default:
        return 0
    # FusedAdam makes all states a second time, and moments below fp32 into fp32 for every step.
    unscaled = 8 if storage.optimizer_state != "fp32" else 0
    return max(state_bytes(workload), unscaled)


def held(workload: Workload, mapping: Mapping) -> float:
    """Return the parameters whose state a GPU of the first pipeline stage has."""
    buffers = workload.buffers(mapping.folding, 0).items()
    return sum(count * buffer.elements / mapping.replicas(buffer)[0] for buffer, count in buffers)


def host_bytes(workload: Workload, mapping: Mapping, hardware: Hardware) -> float:
    """Return the bytes of a node's memory for offloaded state."""
    offloaded = held(workload, mapping) * workload.optimizer.optimizer_offload_fraction
    return HOST_BYTES * offloaded * _gpus_of_node(mapping, hardware)


def host_suffices(workload: Workload, mapping: Mapping, hardware: Hardware) -> bool:
    """Return whether a node's memory holds the offloaded state, also while a checkpoint is saved.

    Without offloading nothing is checked.
    """
    fraction = workload.optimizer.optimizer_offload_fraction
    if not fraction:
        return True
    per_parameter = HOST_BYTES * fraction + GATHERED_BYTES
    needed = per_parameter * held(workload, mapping) * _gpus_of_node(mapping, hardware)
    return needed <= HOST_ROOM * hardware.host_memory_gib * 2**30


def update_seconds(
    workload: Workload, mapping: Mapping, hardware: Hardware, on_gpu: float
) -> float:
    """Return the time of Adam.

    Gradients go to the host, the CPUs update, parameters return: one after the other, because the
    overlap in Megatron-Core 0.15.3 does not wait for the parameters.

    Args:
        workload: Model, batch and storage.
        mapping: The parallel mapping.
        hardware: The GPUs and their nodes.
        on_gpu: Seconds if all state were on the GPU.
    """
    fraction = workload.optimizer.optimizer_offload_fraction
    if not fraction:
        return on_gpu
    offloaded = held(workload, mapping) * fraction
    link = hardware.host_link_bandwidth * 1e9
    copies = offloaded * (4 / (PINNED * link) + 2 / (PAGEABLE * link))
    traffic = HOST_TRAFFIC * offloaded * _gpus_of_node(mapping, hardware)
    update = traffic / (HOST_MEMORY * hardware.host_memory_bandwidth * 1e9)
    return on_gpu * (1 - fraction) + copies + update


def _gpus_of_node(mapping: Mapping, hardware: Hardware) -> int:
    return min(mapping.world_size, hardware.gpus_per_node)
