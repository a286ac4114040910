"""The mappings that a number of ranks allows, a few of each kind."""

from collections.abc import Iterator
from typing import Any

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.plans.layout import validate

LARGEST = 8
"""Largest size of one kind of parallelism: GPUs that NVLink usually joins."""


def mappings(
    arch: Architecture, upcycling: UpcyclingConfig, world_size: int
) -> list[ParallelFolding]:
    """Return mappings for a job: each kind of parallelism alone, then combinations.

    The last mapping combines most kinds.

    Args:
        arch: The dense model's architecture.
        upcycling: What the feed-forward layers become.
        world_size: Ranks of the job.
    """
    found: dict[ParallelFolding, None] = {}
    for sizes in _candidates(_largest(world_size)):
        folding = ParallelFolding.of(**sizes)
        try:
            validate(arch, upcycling, folding, world_size)
        except UpcyclingError:
            continue
        found[folding] = None
    return list(found)


def _largest(world_size: int) -> int:
    """Return the largest power of 2 that divides the ranks, at most `LARGEST`."""
    size = LARGEST
    while world_size % size:
        size //= 2
    return size


def _candidates(size: int) -> Iterator[dict[str, Any]]:
    yield {}
    if size == 1:
        return
    half = size // 2
    for name in ("ep", "etp", "tp", "cp"):
        yield {name: size}
    yield {"pp": min(size, 4)}
    yield {"pp": 2, "vpp": 2}
    yield {"tp": size, "etp": size}
    yield {"tp": size, "ep": size}
    yield {"cp": size, "ep": size}
    yield {"ep": 2, "etp": half}
    yield {"tp": 2, "ep": size}
    yield {"tp": 2, "ep": half, "etp": 2}
    yield {"tp": 2, "cp": 2, "ep": size}
    yield {"pp": 2, "ep": half}
    yield {"pp": 2, "cp": 2, "ep": half}
    yield {"pp": 2, "tp": 2, "ep": half}
    yield {"pp": 2, "vpp": 2, "tp": 2, "ep": half}
