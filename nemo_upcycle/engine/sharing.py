"""Read each slice once per job: which ranks need the same blocks, and which rank reads.

Every rank announces which blocks it needs. A block that several ranks need is read by one of them
and broadcast to the others. Readers are chosen so that all ranks read about the same amount.
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
    """The ranks that share a block.

    Attributes:
        reader: The global rank that reads.
        group: The process group of all these ranks.
        this_rank_reads: Whether `reader` is this rank.
    """

    reader: int
    group: Any
    this_rank_reads: bool


@contextmanager
def sharing(
    blocks: Sequence[Block], tensors: Mapping[str, TensorInfo]
) -> Iterator[dict[Block, Sharers]]:
    """Agree with all other ranks on who reads what; all ranks must call this.

    Args:
        blocks: Blocks that this rank needs.
        tensors: The dense checkpoint's tensors.

    Yields:
        The blocks that other ranks need too. The process groups live as long as the context.
    """
    wanted: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(wanted, list(blocks))
    readers = choose_readers(wanted, tensors)
    rank = torch.distributed.get_rank()
    # Every rank must create every group, also groups without this rank.
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
    """Choose the readers of blocks that several ranks need.

    Args:
        wanted: Blocks that each rank needs.
        tensors: The dense checkpoint's tensors.

    Returns:
        Each shared block's ranks and reader, the same on every rank. The reader is the rank with
            the fewest bytes so far.
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
