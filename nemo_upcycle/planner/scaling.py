"""How a job scales: the best mapping, and the time to load and upcycle, by number of GPUs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.search import Prediction, fastest, least_memory
from nemo_upcycle.planner.space import Allowed, everything
from nemo_upcycle.planner.workload import Workload
from nemo_upcycle.plans.job import Dense, plan_job

GPUS = tuple(2**power for power in range(3, 13))


def sizes(hardware: Hardware) -> tuple[int, ...]:
    """Return the numbers of GPUs to compare: those of `GPUS` that fill nodes, or nodes doubled."""
    filled = tuple(gpus for gpus in GPUS if gpus % hardware.gpus_per_node == 0)
    each = hardware.gpus_per_node
    return filled or tuple(each << n for n in range(13) if GPUS[0] <= each << n <= GPUS[-1])


FILL_BANDWIDTH = 10e9
"""Bytes of parameters that a rank fills per second from a file in the node's page cache. Measured:
13.7 GiB/s for one rank, 8 GiB/s each for two (benchmarks/results/2026-11-25-upcycle-load.md)."""


@dataclass(frozen=True)
class Loading:
    """Reading a dense checkpoint and filling the MoE, without starting processes.

    Attributes:
        bytes_of_node: Bytes that the busiest node reads from the file system.
        bytes_of_job: Bytes that all nodes read.
        seconds: Time of loading.
        seconds_once: The same with `read_once`: all nodes together read each byte once, and GPUs
            send what others need over the network. No network of GPUs was measured.
    """

    bytes_of_node: int
    bytes_of_job: int
    seconds: float
    seconds_once: float


@dataclass(frozen=True)
class Point:
    """A job of one size.

    Attributes:
        gpus: Number of GPUs.
        best: The fastest mapping that fits; None if no mapping fits.
        least: If no mapping fits, the mapping that needs the least memory; None if this number of
            GPUs has no mapping of the model and the batch.
        loading: Loading under the best mapping.
    """

    gpus: int
    best: Prediction | None
    least: Prediction | None
    loading: Loading | None


def scaling(
    workload: Workload,
    dense: Dense,
    hardware: Hardware,
    gpus: Iterable[int] = GPUS,
    allowed: Allowed = everything,
) -> Iterator[Point]:
    """Yield the best mapping for each number of GPUs; the global batch stays the same.

    Args:
        workload: Model and batch.
        dense: The dense model to upcycle.
        hardware: The GPUs.
        gpus: Numbers of GPUs; numbers that do not fill nodes are left out.
        allowed: Which mappings to consider.
    """
    for number in gpus:
        if number % hardware.gpus_per_node:
            continue
        best = fastest(workload, number, hardware, allowed)
        if best is not None:
            yield Point(number, best, None, loading(best, dense))
        else:
            yield Point(number, None, least_memory(workload, number, hardware, allowed), None)


def loading(prediction: Prediction, dense: Dense) -> Loading:
    """Return the bytes and the time to load and upcycle under a mapping.

    Args:
        prediction: The mapping.
        dense: The dense checkpoint.

    Raises:
        UpcyclingError: The GPUs do not fill nodes.
    """
    hardware, mapping = prediction.hardware, prediction.mapping
    nodes, left = divmod(mapping.world_size, hardware.gpus_per_node)
    if left:
        raise UpcyclingError(
            f"{mapping.world_size} GPUs do not fill nodes of {hardware.gpus_per_node}; use a "
            f"multiple of {hardware.gpus_per_node}."
        )
    plan = partial(plan_job, dense, prediction.workload.upcycling, mapping.folding)
    job = plan(nodes, hardware.gpus_per_node, prediction.workload.precision)
    each, every = max(job.bytes_of_nodes), sum(job.bytes_of_nodes)
    reading = max(each / hardware.storage_bandwidth, every / hardware.storage_total) / 1e9
    filling = max(owner.bytes_to_write for owner in job.owners) / FILL_BANDWIDTH
    once = job.bytes_read_once
    reading_once = max(once / nodes / hardware.storage_bandwidth, once / hardware.storage_total)
    link = hardware.nvlink_bandwidth if nodes == 1 else hardware.network_bandwidth
    sending = max(owner.bytes_to_read for owner in job.owners) / link
    seconds_once = (reading_once + sending) / 1e9 + filling
    return Loading(each, every, reading + filling, seconds_once)
