"""Read each slice once per job: which ranks want the same blocks, and which of them reads.

Every rank tells all others what it will read. Blocks that several ranks want are read by one of
them, chosen so that all read about as much, and broadcast to the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.checkpoint import TensorInfo
from nemo_upcycle.plans.rank import Block, block_bytes


@dataclass(frozen=True)
class Sharers:
    """The ranks that want a block.

    Attributes:
        reader: The global rank that reads it.
        group: The process group of them all.
        this_rank_reads: Whether `reader` is this rank.
    """

    reader: int
    group: Any
    this_rank_reads: bool


@contextmanager
def sharing(
    blocks: Sequence[Block], tensors: Mapping[str, TensorInfo]
) -> Iterator[dict[Block, Sharers]]:
    """Agree with all other ranks on who reads what; all ranks must call it.

    Args:
        blocks: What this rank wants.
        tensors: The dense checkpoint's tensors.

    Yields:
        The blocks that are wanted elsewhere too. Their process groups live as long as the context.
    """
    wanted: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(wanted, list(blocks))
    readers = choose_readers(wanted, tensors)
    rank = torch.distributed.get_rank()
    # Every rank has to make every group, also those that it is not in.
    groups = {
        ranks: torch.distributed.new_group(list(ranks))
        for ranks in sorted({ranks for ranks, _ in readers.values()})
    }
    try:
        yield {
            block: Sharers(readers[block][1], groups[readers[block][0]], readers[block][1] == rank)
            for block in blocks
            if block in readers
        }
    finally:
        for ranks, group in groups.items():
            if rank in ranks:
                torch.distributed.destroy_process_group(group)


def choose_readers(
    wanted: Sequence[Sequence[Block]], tensors: Mapping[str, TensorInfo]
) -> dict[Block, tuple[tuple[int, ...], int]]:
    """Choose who reads the blocks that several ranks want.

    Args:
        wanted: What each rank wants.
        tensors: The dense checkpoint's tensors.

    Returns:
        For each such block its ranks, and the one of them that reads, the same on every rank: the
        one with the fewest bytes so far.
    """
    ranks_of: dict[Block, list[int]] = {}
    for rank, blocks in enumerate(wanted):
        for block in blocks:
            ranks_of.setdefault(block, []).append(rank)
    load = [0] * len(wanted)
    readers: dict[Block, tuple[tuple[int, ...], int]] = {}
    by_size = sorted(ranks_of, key=lambda b: (-block_bytes(b, tensors), b.tensor, b.rows))
    for block in by_size:
        ranks = ranks_of[block]
        reader = min(ranks, key=lambda rank: load[rank])
        load[reader] += block_bytes(block, tensors)
        if len(ranks) > 1:
            readers[block] = (tuple(ranks), reader)
    return readers
