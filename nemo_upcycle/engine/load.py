"""Execute the plan on this rank: fill the parameters of Megatron-Core modules."""

import resource
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.branches import branch_name
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.fingerprint import check_tied
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.experts import bytes_to_initialize, initialize_experts
from nemo_upcycle.engine.owned_shards import OwnedShard, owned_shards
from nemo_upcycle.engine.reading import Chunk, chunk_bytes, copy_blocks
from nemo_upcycle.engine.sharing import Sharers, sharing
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families import Architecture
from nemo_upcycle.initializers import initialize_router
from nemo_upcycle.plans.rank import Block, Plan, Target, make_plan
from nemo_upcycle.progress import Progress, no_progress
from nemo_upcycle.trained.opened import Trained
from nemo_upcycle.trained.restore import plan_restore


@dataclass(frozen=True)
class LoadReport:
    """What a rank has done.

    Attributes:
        tensors: Names of the dense tensors used.
        bytes_read: Bytes read from the checkpoint by this rank.
        shards: Shards written.
        seconds: Wall time.
        peak_resident_bytes: Largest resident memory of the process so far.
    """

    tensors: frozenset[str]
    bytes_read: int
    shards: int
    seconds: float
    peak_resident_bytes: int


def fill(
    modules: Sequence[torch.nn.Module],
    checkpoint: DenseCheckpoint,
    upcycling: UpcyclingConfig,
    progress: Progress | None = None,
    read_once: bool = False,
) -> LoadReport:
    """Fill this rank's part of the model from a dense checkpoint.

    Args:
        modules: The rank's Megatron-Core GPT models, one per virtual pipeline stage.
        checkpoint: The dense checkpoint.
        upcycling: What the dense feed-forward layers become, with initializers that fit the
            checkpoint: `engine.upcycling.prepare` checks them.
        progress: See `fill_shards`.
        read_once: Read each slice once per job and broadcast the slice to all ranks that need
            it; must be equal on all ranks. Otherwise every rank reads what it needs.

    Returns:
        A report.

    Raises:
        UpcyclingError: The checkpoint is damaged or does not fit the model. The error is raised
            before anything is written, except for values that are not finite.
    """
    owned = [shard for module in modules for shard in owned_shards(module)]
    return fill_shards(owned, checkpoint, upcycling, progress, read_once)


def fill_shards(
    owned: Sequence[OwnedShard],
    checkpoint: DenseCheckpoint,
    upcycling: UpcyclingConfig,
    progress: Progress | None = None,
    read_once: bool = False,
) -> LoadReport:
    """Fill shards from a dense checkpoint, wherever their memory is; see `fill`.

    Args:
        owned: The shards, with all shards of an expert if an initializer is to change it.
        checkpoint: The dense checkpoint.
        upcycling: What the dense feed-forward layers become.
        progress: Called with the bytes done and the bytes in total: those filled, and those that
            an initializer or scaling then changes.
        read_once: See `fill`.
    """
    started = time.perf_counter()
    check_whole(checkpoint)
    arch = checkpoint.architecture
    for branch in checkpoint.branches:
        check_tied(branch)
    plan = make_plan(
        [own.shard for own in owned],
        checkpoint.tensors,
        checkpoint.family,
        arch,
        upcycling,
        len(checkpoint.branches),
    )
    show = progress or no_progress
    total = plan.bytes_to_read + bytes_to_initialize(owned, arch, upcycling)
    with torch.no_grad():
        _draw_routers(plan, owned, arch, upcycling)
        bytes_read = _copy(
            plan, owned, checkpoint, lambda done, _: show(done, total), read_once=read_once
        )
        bytes_read += initialize_experts(
            owned, checkpoint, upcycling, lambda done: show(plan.bytes_to_read + done, total)
        )
    checkpoint.close()
    return LoadReport(
        tensors=plan.tensors,
        bytes_read=bytes_read,
        shards=len(owned),
        seconds=time.perf_counter() - started,
        peak_resident_bytes=_peak_resident_bytes(),
    )


def restore(
    modules: Sequence[torch.nn.Module], trained: Trained, progress: Progress | None = None
) -> frozenset[str]:
    """Fill this rank's part of the model from a trained model.

    Args:
        modules: The rank's Megatron-Core GPT models, one per virtual pipeline stage.
        trained: The trained model, in any format, saved under any mapping.
        progress: Called with the bytes filled and the bytes in total, in the checkpoint's dtypes.

    Returns:
        Names of the tensors used. All ranks together must use all; see `check_all_restored`.

    Raises:
        UpcyclingError: The checkpoint is damaged or does not fit the model.
    """
    owned = [shard for module in modules for shard in owned_shards(module)]
    plan = plan_restore([own.shard for own in owned], trained)
    with torch.no_grad():
        _copy(plan, owned, trained.checkpoint, progress or no_progress, read_once=False)
    trained.checkpoint.close()
    return plan.tensors


def check_all_used(checkpoint: DenseCheckpoint, reports: Iterable[LoadReport]) -> None:
    """Check that the ranks together have used the whole dense model.

    Args:
        checkpoint: The dense checkpoint.
        reports: The reports of all ranks.

    Raises:
        UpcyclingError: A tensor was not used; the model is smaller than the checkpoint.
    """
    used = frozenset().union(*(report.tensors for report in reports))
    expected = checkpoint.family.shapes(checkpoint.architecture)
    branches = range(len(checkpoint.branches))
    unused = [
        name
        for name in expected
        if name not in used and not all(branch_name(i, name) in used for i in branches)
    ]
    if unused:
        raise UpcyclingError(
            f"The model has no place for {len(unused)} tensors of {checkpoint.directory}: "
            f"{listing(unused)}. Make the model's config from the checkpoint's config."
        )


def _draw_routers(
    plan: Plan, owned: Sequence[OwnedShard], arch: Architecture, upcycling: UpcyclingConfig
) -> None:
    for router in plan.routers:
        own = owned[router.shard]
        values = initialize_router(upcycling, router.layer, own.shard.rows, arch.hidden_size)
        own.data.copy_(torch.from_numpy(values))


def _copy(
    plan: Plan,
    owned: Sequence[OwnedShard],
    checkpoint: DenseCheckpoint,
    progress: Progress,
    read_once: bool,
) -> int:
    """Execute the plan's copies; return the bytes that this rank has read."""
    for target in plan.zeros:
        owned[target.shard].data[target.rows[0] : target.rows[1]].zero_()
    blocks = sorted(plan.copies, key=lambda block: _place(block, checkpoint, read_once))
    share = read_once and torch.distributed.is_initialized()
    device = owned[0].data.device
    done = bytes_read = 0

    def write(chunk: Chunk, values: torch.Tensor) -> None:
        _write(owned, plan.copies[chunk.block], chunk, values)

    sharers: AbstractContextManager[dict[Block, Sharers]] = nullcontext({})
    if share:
        sharers = sharing(blocks, checkpoint.tensors)
    with sharers as shared:
        for chunk in copy_blocks(checkpoint, blocks, device, shared, write):
            info = checkpoint.tensors[chunk.block.tensor]
            size = info.stored(chunk_bytes(chunk, checkpoint)) * info.sources
            done += size
            if chunk.block not in shared or shared[chunk.block].this_rank_reads:
                bytes_read += size
            progress(done, plan.bytes_to_read)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return bytes_read


def _place(block: Block, checkpoint: DenseCheckpoint, read_once: bool) -> tuple[object, ...]:
    """Sort key of a block: the order in the files, so that a disk reads forward.

    Broadcast blocks need the same order on all ranks, whose files may differ.
    """
    piece = checkpoint.pieces(block.tensor)[0]
    file = () if read_once else (piece.file, piece.start)
    return *file, block.tensor, block.rows, block.columns or (0, 0)


def _write(
    owned: Sequence[OwnedShard], targets: Sequence[Target], chunk: Chunk, values: torch.Tensor
) -> None:
    if len(targets) > 1:
        values = values.to(owned[targets[0].shard].data.dtype)  # once for all targets
    count = chunk.rows[1] - chunk.rows[0]
    for target in targets:
        start = target.rows[0] + chunk.first
        owned[target.shard].data[start : start + count].copy_(values)


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
