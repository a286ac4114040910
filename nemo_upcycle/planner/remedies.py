"""What would fit, where nothing fits: fewer experts, more GPUs, settings left open."""

from collections.abc import Iterator
from dataclasses import replace

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.nodes import of_job
from nemo_upcycle.planner.search import any_fits
from nemo_upcycle.planner.space import Allowed, everything, mappings_of
from nemo_upcycle.planner.workload import Workload

MOST_TIMES = 64
"""How many times as many GPUs are tried."""


def fits(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed = everything
) -> bool:
    """Return whether any mapping fits."""
    used = of_job(hardware, world_size)
    return any_fits(workload, used, mappings_of(workload, world_size, used, allowed))


def fewest_gpus(
    workload: Workload, hardware: Hardware, first: int, allowed: Allowed = everything
) -> int | None:
    """Return the first of `first`, 2·first, 4·first … GPUs that fit; None if none does.

    Args:
        workload: Model and batch.
        hardware: The GPUs.
        first: The smallest number of GPUs.
        allowed: Which mappings to consider.
    """
    gpus = first
    while gpus <= first * MOST_TIMES:
        if fits(workload, gpus, hardware, allowed):
            return gpus
        gpus *= 2
    return None


def fewer_experts(upcycling: UpcyclingConfig) -> Iterator[UpcyclingConfig]:
    """Yield half, a quarter … of the experts, as few as top-k allows."""
    rate = upcycling.expansion_rate // 2
    while rate and upcycling.num_moe_experts is not None:
        try:
            yield replace(upcycling, num_moe_experts=rate * upcycling.granularity)
        except UpcyclingError:
            return
        rate //= 2


def remedies(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed = everything
) -> list[str]:
    """Return what would fit, in words: at most one of each kind.

    Args:
        workload: Model and batch, for which nothing fits.
        world_size: Number of GPUs.
        hardware: The GPUs.
        allowed: Which mappings were considered.
    """
    found = []
    if allowed is not everything and fits(workload, world_size, hardware):
        found.append("the same GPUs, with mapping and recompute left to the planner")
    for fewer in fewer_experts(workload.upcycling):
        smaller = replace(workload, upcycling=fewer)
        if fits(smaller, world_size, hardware, allowed):
            found.append(f"num_moe_experts={fewer.num_moe_experts} on the same GPUs")
            break
    gpus = fewest_gpus(workload, hardware, 2 * world_size, allowed)
    if gpus is not None:
        found.append(f"{gpus} GPUs")
    return found
