"""Bandwidth of the collectives of training, inside a node and across nodes."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml

from nemo_upcycle.check.findings import BANDWIDTH, Bandwidth, Finding
from nemo_upcycle.check.process_groups import device
from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.files import write_whole
from nemo_upcycle.planner.efficiency import CALIBRATED
from nemo_upcycle.planner.hardware import Hardware, device_hardware, hardware
from nemo_upcycle.planner.machine import GIGA, Machine

BYTES = {"cuda": 2**28, "cpu": 2**22}
"""Size of a message by device; on GPUs large enough that latency does not count."""

WARM_UP, REPEATED = 3, 7

SLOW = 0.5
"""Fraction of the planner's bandwidth below which a collective on GPUs is a failure."""


@dataclass(frozen=True)
class _Collective:
    """A collective over a group of n ranks, on a message of S bytes.

    Attributes:
        run: Runs the collective; takes the message and the group.
        sent: Bytes that each rank sends, in units of S, for n ranks.
    """

    run: Callable[[torch.Tensor, torch.distributed.ProcessGroup], None]
    sent: Callable[[int], float]


def _all_reduce(message: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
    torch.distributed.all_reduce(message, group=group)


def _all_gather(message: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
    part = message.chunk(group.size())[group.rank()].clone()
    torch.distributed.all_gather_into_tensor(message, part, group=group)


def _all_to_all(message: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
    torch.distributed.all_to_all_single(torch.empty_like(message), message, group=group)


def _to_the_next(message: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
    size, rank = group.size(), group.rank()
    send, receive = torch.distributed.isend, torch.distributed.irecv
    work = [
        torch.distributed.P2POp(send, message, group=group, group_peer=(rank + 1) % size),
        torch.distributed.P2POp(
            receive, torch.empty_like(message), group=group, group_peer=(rank - 1) % size
        ),
    ]
    for each in torch.distributed.batch_isend_irecv(work):
        each.wait()


COLLECTIVES = {
    "all-reduce": _Collective(_all_reduce, lambda n: 2 * (n - 1) / n),
    "all-gather": _Collective(_all_gather, lambda n: (n - 1) / n),
    "all-to-all": _Collective(_all_to_all, lambda n: (n - 1) / n),
    "point to point": _Collective(_to_the_next, lambda n: 1.0),
}

OF_THE_PLANNER = ("all-gather", "all-to-all")
"""The collectives whose slower one becomes the bandwidth in the hardware file."""


def known_hardware(source: str | None) -> Hardware | None:
    """Return the hardware with a name, or else of this device; None if unknown."""
    if source is not None:
        return hardware(source)
    return device_hardware(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def measure(known: Hardware | None, ranks: Ranks) -> list[Bandwidth]:
    """Measure all collectives; every rank of a job must call this.

    Groups inside a node are all ranks of a node. Groups across nodes are one rank per node, all
    groups at the same time, so that every GPU uses its own network link.

    Args:
        known: The hardware by data sheet.
        ranks: The job's ranks.

    Returns:
        The same results on all ranks.
    """
    found = []
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    for across_nodes, groups in _groups(ranks.size, per_node):
        mine = [torch.distributed.new_group(members) for members in groups]
        group = next(
            one for one, members in zip(mine, groups, strict=True) if ranks.rank in members
        )
        size = len(groups[0])
        domain = per_node if known is None else max(known.nvlink_domain, per_node)
        over_network = across_nodes and per_node * size > domain
        for name, collective in COLLECTIVES.items():
            seconds = max(ranks.gather(_seconds(collective, group)))
            sent = BYTES[device().type] * collective.sent(size)
            planned = None if known is None else _planned(known, over_network)
            measured = sent / seconds / GIGA
            found.append(Bandwidth(name, across_nodes, over_network, size, measured, planned))
    return found


def _groups(size: int, per_node: int) -> Iterator[tuple[bool, list[list[int]]]]:
    nodes = size // per_node
    if per_node > 1:
        yield False, [list(range(n * per_node, (n + 1) * per_node)) for n in range(nodes)]
    if nodes > 1:
        yield True, [list(range(first, size, per_node)) for first in range(per_node)]


def _planned(known: Hardware, over_network: bool) -> float:
    machine = Machine(known, CALIBRATED)
    return (machine.network if over_network else machine.nvlink) / GIGA


def _seconds(collective: _Collective, group: torch.distributed.ProcessGroup) -> float:
    count = BYTES[device().type] // 4
    message = torch.zeros(count - count % group.size(), device=device())
    times = []
    for _ in range(WARM_UP + REPEATED):
        torch.distributed.barrier(group)
        _synchronize()
        started = time.perf_counter()
        collective.run(message, group)
        _synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def findings(bandwidths: list[Bandwidth]) -> Iterator[Finding]:
    """Judge bandwidths of GPUs; on CPU there is nothing to compare with."""
    for each in bandwidths if torch.cuda.is_available() else ():
        if each.planned is not None:
            where = "across nodes" if each.across_nodes else "inside a node"
            least = SLOW * each.planned
            yield Finding(
                BANDWIDTH,
                f"{each.collective} of {each.ranks} ranks {where}",
                each.measured >= least,
                f"{each.measured:.1f} GB/s",
                f"at least {least:.1f} GB/s, {SLOW:.0%} of what the planner counts with",
            )


def write_hardware(known: Hardware, bandwidths: list[Bandwidth], per_node: int, path: Path) -> None:
    """Write the hardware with the measured bandwidths, for `nemo-upcycle tune --measured`.

    The planner multiplies a data sheet's bandwidth by the fraction that training reaches. The file
    has the measured bandwidth divided by this fraction, so that the planner counts with what was
    measured.

    Args:
        known: The hardware by data sheet.
        bandwidths: What was measured.
        per_node: Ranks per node.
        path: The file to write.
    """
    nvlink = _slowest(bandwidths, over_network=False)
    network = _slowest(bandwidths, over_network=True)
    found = {"nvlink_bandwidth": nvlink, "network_bandwidth": network}
    measured = replace(
        known,
        measured=" ".join(name for name, value in found.items() if value is not None),
        gpus_per_node=per_node,
        nvlink_bandwidth=_divided(nvlink, CALIBRATED.nvlink) or known.nvlink_bandwidth,
        network_bandwidth=_divided(network, CALIBRATED.network) or known.network_bandwidth,
    )
    said = [
        f"{name}: {value:.4g} GB/s measured, by {fraction}, the planner's fraction"
        if value
        else f"{name}: not measured, as in the data sheet"
        for name, value, fraction in (
            ("nvlink_bandwidth", nvlink, CALIBRATED.nvlink),
            ("network_bandwidth", network, CALIBRATED.network),
        )
    ]
    lines = [f"# {line}\n" for line in ("Measured by `nemo-upcycle check`.", *said)]
    write_whole(path, "".join(lines) + yaml.safe_dump(asdict(measured), sort_keys=False))


def _slowest(bandwidths: list[Bandwidth], over_network: bool) -> float | None:
    return min(
        (
            each.measured
            for each in bandwidths
            if each.over_network == over_network and each.collective in OF_THE_PLANNER
        ),
        default=None,
    )


def _divided(measured: float | None, fraction: float) -> float | None:
    return None if measured is None else float(f"{measured / fraction:.4g}")
