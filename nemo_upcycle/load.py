"""Carry out the plan on this rank: Megatron-Core modules in, filled parameters out.

The model itself says what the rank owns: `sharded_state_dict()` gives each shard's place in the
whole parameter, and its data are views of the parameter, so that writing a shard writes the
parameter in place.
"""

import re
import resource
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.initializers import random_router
from nemo_upcycle.mapping import Architecture, family_of
from nemo_upcycle.plan import Block, Plan, Shard, Target, block_bytes, check_tensors, make_plan

CHUNK_BYTES = 64 * 2**20
"""At most this much of the dense checkpoint is held at a time."""

_STACKED_LAYERS = re.compile(r"^decoder\.layers\.(?!\d)")
_STACKED_EXPERTS = ".mlp.experts.experts."

Progress = Callable[[int, int], None]
"""Called with the bytes read and the bytes to read."""


@dataclass(frozen=True)
class LoadReport:
    """What one rank did.

    Attributes:
        tensors: Names of the dense tensors read.
        bytes_read: Bytes read from the checkpoint.
        shards: Shards written.
        seconds: Wall time.
        peak_resident_bytes: Largest resident memory of the process so far.
    """

    tensors: frozenset[str]
    bytes_read: int
    shards: int
    seconds: float
    peak_resident_bytes: int


@dataclass(frozen=True)
class OwnedShard:
    """A shard and the view of the parameter that holds it."""

    shard: Shard
    data: torch.Tensor


def upcycle(
    modules: Sequence[torch.nn.Module],
    checkpoint: HuggingFaceCheckpoint,
    upcycling: UpcyclingConfig,
    progress: Progress | None = None,
) -> LoadReport:
    """Fill this rank's part of the model from a dense checkpoint.

    Args:
        modules: The rank's Megatron-Core GPT models, one a virtual pipeline stage.
        checkpoint: The dense checkpoint.
        upcycling: What its feed-forward layers become.
        progress: Called as bytes are read.

    Returns:
        What was done.

    Raises:
        UpcyclingError: The checkpoint is damaged or does not fit the model. The error is raised
            before anything is written, except for values that are not finite.
    """
    started = time.perf_counter()
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    check_tensors(checkpoint.tensors, family, arch, str(checkpoint.directory))
    owned = [shard for module in modules for shard in owned_shards(module)]
    plan = make_plan([own.shard for own in owned], checkpoint.tensors, family, arch, upcycling)
    _carry_out(plan, owned, checkpoint, arch, upcycling, progress or (lambda done, total: None))
    return LoadReport(
        tensors=plan.tensors,
        bytes_read=plan.bytes_to_read,
        shards=len(owned),
        seconds=time.perf_counter() - started,
        peak_resident_bytes=_peak_resident_bytes(),
    )


def check_all_used(checkpoint: HuggingFaceCheckpoint, reports: Iterable[LoadReport]) -> None:
    """Check that the ranks together have read the whole dense model.

    Args:
        checkpoint: The dense checkpoint.
        reports: What every rank did.

    Raises:
        UpcyclingError: Some tensor went nowhere; the model is smaller than the checkpoint.
    """
    used = frozenset().union(*(report.tensors for report in reports))
    family = family_of(checkpoint.config)
    expected = family.shapes(family.architecture(checkpoint.config))
    unused = [name for name in expected if name not in used]
    if unused:
        raise UpcyclingError(
            f"The model has no place for {len(unused)} tensors of {checkpoint.directory}: "
            f"{listing(unused)}. Make the model's config from the checkpoint's config.json."
        )


def owned_shards(module: torch.nn.Module) -> list[OwnedShard]:
    """Return what this rank owns of a Megatron-Core model.

    Raises:
        UpcyclingError: A parameter is not covered exactly once by views of itself.
    """
    state: ShardedStateDict = module.sharded_state_dict()
    owned = [_owned(tensor) for tensor in _sharded_tensors(state.values())]
    _check_coverage(module, owned)
    return owned


def _sharded_tensors(values: Iterable[object]) -> Iterator[ShardedTensor]:
    """Yield the sharded tensors; factories split fused parameters (gate and up) into views."""
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            built = value.build()
            yield from _sharded_tensors(built if isinstance(built, list) else [built])
        elif isinstance(value, ShardedTensor):
            yield value


def _owned(tensor: ShardedTensor) -> OwnedShard:
    name, prepended = tensor.key, list(tensor.global_offset[: tensor.prepend_axis_num])
    if _STACKED_LAYERS.match(name):
        name = _STACKED_LAYERS.sub(f"decoder.layers.{prepended.pop(0)}.", name)
    if _STACKED_EXPERTS in name:
        if not prepended:
            raise UpcyclingError(
                f"{name} holds several experts in one tensor (legacy grouped GEMM); expected one "
                "tensor an expert. Set moe_use_legacy_grouped_gemm=False."
            )
        name = name.replace(_STACKED_EXPERTS, f".mlp.experts.{prepended.pop(0)}.")
    skip = tensor.prepend_axis_num
    shard = Shard(
        name=name,
        global_shape=tuple(tensor.global_shape[skip:]),
        offset=tuple(tensor.global_offset[skip:]),
        shape=tuple(tensor.local_shape),
    )
    return OwnedShard(shard, tensor.data)


def _check_coverage(module: torch.nn.Module, owned: list[OwnedShard]) -> None:
    """Check that the shards cover every parameter exactly once, as views of it."""
    parameters = sorted(module.named_parameters(), key=lambda item: item[1].data_ptr())
    starts = [parameter.data_ptr() for _, parameter in parameters]
    written = [0] * len(parameters)
    for own in owned:
        index = bisect_right(starts, own.data.data_ptr()) - 1
        parameter = parameters[index][1]
        if index >= 0 and own.data.data_ptr() < parameter.data_ptr() + parameter.nbytes:
            written[index] += own.data.numel()
    wrong = [
        name
        for (name, parameter), count in zip(parameters, written, strict=True)
        if count != parameter.numel()
    ]
    if wrong:
        raise UpcyclingError(
            f"{len(wrong)} parameters would not be written exactly once: {listing(wrong)}. "
            "This Megatron-Core describes them in a way that is not known here; please report it."
        )


@torch.no_grad()
def _carry_out(
    plan: Plan,
    owned: Sequence[OwnedShard],
    checkpoint: HuggingFaceCheckpoint,
    arch: Architecture,
    upcycling: UpcyclingConfig,
    progress: Progress,
) -> None:
    for router in plan.routers:
        own = owned[router.shard]
        values = random_router(
            upcycling.seed,
            router.layer,
            own.shard.rows,
            arch.hidden_size,
            upcycling.router_init_std,
        )
        own.data.copy_(torch.from_numpy(values))
    for target in plan.zeros:
        _rows(owned, target).zero_()
    done = 0
    # By file and then by place, so that a spinning or networked disk reads forward.
    blocks = sorted(
        plan.copies, key=lambda b: (checkpoint.tensors[b.tensor].file, b.tensor, b.rows)
    )
    for block in blocks:
        for chunk, first in _chunks(block, checkpoint):
            values_read = checkpoint.read(chunk.tensor, chunk.rows, chunk.columns)
            for target in plan.copies[block]:
                rows = _rows(owned, target)
                rows[first : first + len(values_read)].copy_(values_read)
            done += block_bytes(chunk, checkpoint.tensors)
            progress(done, plan.bytes_to_read)
    checkpoint.close()


def _rows(owned: Sequence[OwnedShard], target: Target) -> torch.Tensor:
    return owned[target.shard].data[target.rows[0] : target.rows[1]]


def _chunks(block: Block, checkpoint: HuggingFaceCheckpoint) -> Iterator[tuple[Block, int]]:
    """Yield the block in runs of rows that fit `CHUNK_BYTES`, with each run's first row in it."""
    start, stop = block.rows
    row_bytes = block_bytes(block, checkpoint.tensors) // (stop - start)
    step = max(1, CHUNK_BYTES // row_bytes)
    for row in range(start, stop, step):
        yield Block(block.tensor, (row, min(row + step, stop)), block.columns), row - start


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank if any rank failed, so that none waits for one that is gone.

    Args:
        error: This rank's error, if it has one.

    Raises:
        UpcyclingError: Some rank failed; names the ranks and says what each one said.
    """
    messages: list[str | None] = [str(error) if error else None]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        messages = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(messages, str(error) if error else None)
    by_message: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        if message:
            by_message.setdefault(message, []).append(rank)
    if not by_message:
        return
    if len(by_message) == 1 and len(next(iter(by_message.values()))) == len(messages):
        raise UpcyclingError(next(iter(by_message))) from error
    parts = [f"rank {','.join(map(str, ranks))}: {text}" for text, ranks in by_message.items()]
    raise UpcyclingError("; ".join(parts)) from error
