"""Nodes of a job: the same number of GPUs of every node, which need not be all."""

from collections.abc import Callable
from dataclasses import replace

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware


def nodes_of(
    gpus: int, gpus_per_node: int, works: Callable[[int], bool] | None = None
) -> tuple[int, int]:
    """Return nodes and GPUs per node for exactly this number of GPUs, with the fewest nodes.

    A job that needs more than one node uses at least half of each.

    Args:
        gpus: Number of GPUs.
        gpus_per_node: The largest number of GPUs per node.
        works: Which other numbers of GPUs may be proposed. Default: all.

    Raises:
        UpcyclingError: The GPUs cannot be spread like this; the message has the nearest numbers
            that can.
    """
    if min(gpus, gpus_per_node) < 1:
        raise UpcyclingError(f"{gpus} GPUs on nodes of {gpus_per_node}; expected 1 or more.")
    found = spread(gpus, gpus_per_node)
    if found is None:
        others = " or ".join(_in_words(n, gpus_per_node) for n in near(gpus, gpus_per_node, works))
        raise UpcyclingError(
            f"{gpus} GPUs do not spread evenly over nodes of {gpus_per_node} GPUs, with at least "
            f"half of each node in use. Use {others or 'another number of GPUs'}."
        )
    return found


def of_job(hardware: Hardware, gpus: int) -> Hardware:
    """Return hardware whose nodes have the GPUs that a job uses of each.

    Args:
        hardware: The GPUs and their nodes.
        gpus: Number of GPUs of the job.

    Raises:
        UpcyclingError: The GPUs do not spread evenly over nodes.
    """
    nodes, per_node = nodes_of(gpus, hardware.gpus_per_node)
    return hardware if nodes == 1 else with_nodes(hardware, per_node)


def with_nodes(hardware: Hardware, gpus_per_node: int) -> Hardware:
    """Return hardware of which a job uses a number of GPUs per node.

    Args:
        hardware: The GPUs and their nodes.
        gpus_per_node: GPUs in use on each node.

    Raises:
        UpcyclingError: A node has fewer GPUs.
    """
    whole, domain = hardware.gpus_per_node, hardware.nvlink_domain
    if not 1 <= gpus_per_node <= whole:
        raise UpcyclingError(
            f"num_gpus_per_node is {gpus_per_node}, but a node of {hardware.name} has {whole} "
            f"GPUs; use 1 to {whole}, or hardware with a larger gpus_per_node."
        )
    # An NVLink domain is some whole nodes, or a part of one.
    joined = domain // whole * gpus_per_node if domain >= whole else min(domain, gpus_per_node)
    return replace(hardware, gpus_per_node=gpus_per_node, nvlink_domain=joined)


def spread(gpus: int, gpus_per_node: int) -> tuple[int, int] | None:
    """Return nodes and GPUs per node as of `nodes_of`; None if the GPUs cannot be spread."""
    fewest, most = -(-gpus // gpus_per_node), max(1, 2 * gpus // gpus_per_node)
    nodes = next((n for n in range(fewest, most + 1) if gpus % n == 0), None)
    return None if nodes is None else (nodes, gpus // nodes)


def near(gpus: int, gpus_per_node: int, works: Callable[[int], bool] | None = None) -> list[int]:
    """Return the nearest smaller and the nearest larger number that spread evenly and work.

    Args:
        gpus: Number of GPUs.
        gpus_per_node: The largest number of GPUs per node.
        works: Which numbers may be returned. Default: all.
    """
    smaller, larger = range(gpus - 1, 0, -1), range(gpus + 1, 2 * gpus + gpus_per_node)
    found = (
        next((n for n in some if spread(n, gpus_per_node) and (works is None or works(n))), None)
        for some in (smaller, larger)
    )
    return [number for number in found if number is not None]


def _in_words(gpus: int, gpus_per_node: int) -> str:
    nodes, each = spread(gpus, gpus_per_node) or (1, gpus)
    return f"{gpus} ({nodes} {'node' if nodes == 1 else 'nodes'} of {each})"
