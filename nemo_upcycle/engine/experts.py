"""Apply an initializer to experts that are copies of the dense layer, in place.

This is the second pass over a rank's experts; plain copies need no second pass. Neurons are
processed in blocks, in fp32, so that each value is rounded once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.config import Scales, UpcyclingConfig
from nemo_upcycle.engine.dense_parts import BLOCK_BYTES, DenseParts
from nemo_upcycle.engine.owned_shards import OwnedShard
from nemo_upcycle.engine.reading import thread_count
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.names import expert_of, is_shared, layer_of
from nemo_upcycle.initializers import Initializer, Neurons, make_initializer
from nemo_upcycle.initializers.one_thread import one_thread


@dataclass(frozen=True)
class _Expert:
    """A rank's part of an expert: some neurons of gate, up and down; those of down as columns."""

    layer: int
    number: int | None
    start: int
    parts: Mapping[str, torch.Tensor]


def bytes_to_initialize(
    owned: Sequence[OwnedShard], arch: Architecture, upcycling: UpcyclingConfig
) -> int:
    """Return the size of the experts that `initialize_experts` changes; 0 for plain copies."""
    scales = upcycling.scales(arch.gated_linear_unit)
    if upcycling.initializer == "copy" and scales.gate == scales.up == scales.down == 1:
        return 0
    return sum(own.data.nbytes for own in owned if _is_initialized(own, upcycling))


def initialize_experts(
    owned: Sequence[OwnedShard],
    checkpoint: DenseCheckpoint,
    upcycling: UpcyclingConfig,
    done: Callable[[int], None] = lambda done: None,
) -> int:
    """Initialize and scale this rank's experts, which hold copies of the dense layer's shards.

    Args:
        owned: The shards that this rank owns.
        checkpoint: The dense checkpoint.
        upcycling: Gives the initializer and the scaling.
        done: Called with the bytes of experts that are finished.

    Returns:
        Bytes read from the checkpoint.

    Raises:
        UpcyclingError: There is no such initializer, or the checkpoint cannot be read.
    """
    arch = checkpoint.architecture
    scales = upcycling.scales(arch.gated_linear_unit)
    _scale_shared_experts(owned, scales.shared_down)
    if not bytes_to_initialize(owned, arch, upcycling):
        return 0
    experts = list(_experts((own for own in owned if _is_initialized(own, upcycling)), arch))
    if upcycling.initializer == "copy":
        _scale(experts, scales, done)
        return 0
    dense = DenseParts(checkpoint)
    work = _Work(make_initializer(upcycling.initializer), scales, arch, upcycling, dense)
    step = max(1, BLOCK_BYTES // (4 * arch.hidden_size))
    blocks = [
        (expert, range(first, min(first + step, count)))
        for expert in experts
        for count in [len(expert.parts["up"])]
        for first in range(0, count, step)
    ]
    with one_thread(), ThreadPoolExecutor(thread_count()) as threads:
        finished = threads.map(lambda block: work.initialize(*block), blocks)
        for size in accumulate(finished):
            done(size)
    return dense.bytes_read


def _scale(experts: Iterable[_Expert], scales: Scales, done: Callable[[int], None]) -> None:
    size = 0
    for expert in experts:
        for part, values in expert.parts.items():
            if (scale := getattr(scales, part)) != 1:
                values.mul_(scale)
            size += values.nbytes
        done(size)


def _scale_shared_experts(owned: Iterable[OwnedShard], scale: float) -> None:
    if scale != 1:
        for own in owned:
            if own.shard.name.endswith(".mlp.shared_experts.linear_fc2.weight"):
                own.data.mul_(scale)


def _is_initialized(own: OwnedShard, upcycling: UpcyclingConfig) -> bool:
    """Return whether a shard is of an expert to initialize: of a routed one, or a shared part."""
    is_part = upcycling.moe_shared_expert_intermediate_size is not None
    shared = is_part and upcycling.rearranges and is_shared(own.shard.name)
    return shared or expert_of(own.shard.name) is not None


def _experts(owned: Iterable[OwnedShard], arch: Architecture) -> Iterator[_Expert]:
    """Group the shards of each expert."""
    shards: dict[tuple[int, int | None], list[OwnedShard]] = {}
    for own in owned:
        layer, expert = layer_of(own.shard.name), expert_of(own.shard.name)
        if layer is not None:
            shards.setdefault((layer, expert), []).append(own)
    for (layer, expert), group in shards.items():
        parts = {}
        for own in group:
            if own.shard.name.endswith(".linear_fc2.weight"):
                parts["down"], start = own.data.T, own.shard.offset[1]
            else:
                first_half = own.shard.offset[0] < own.shard.global_shape[0] // 2
                parts["gate" if arch.gated_linear_unit and first_half else "up"] = own.data
        yield _Expert(layer, expert, start, parts)


@dataclass(frozen=True)
class _Work:
    initializer: Initializer
    scales: Scales
    arch: Architecture
    upcycling: UpcyclingConfig
    dense: DenseParts

    @torch.no_grad()
    def initialize(self, expert: _Expert, rows: range) -> int:
        """Initialize a block of an expert's neurons on this rank; return the size in bytes."""
        width, copy = self.arch.ffn_hidden_size, 0
        first, stop, scales = 0, self.upcycling.shared_width(width), Scales()
        if expert.number is not None:
            first, stop = self.upcycling.neurons(expert.number, width)
            copy, scales = self.upcycling.copy_of(expert.number), self.scales
        start = first + expert.start
        here = slice(rows.start, rows.stop)
        values = {
            part: data[here].float().cpu().numpy().copy() for part, data in expert.parts.items()
        }
        self.initializer(
            Neurons(
                layer=expert.layer,
                expert=expert.number or 0,
                copy=copy,
                ids=range(start + rows.start, start + rows.stop),
                expert_ids=range(first, stop),
                values=values,
                init_method_std=self.arch.init_method_std,
                num_layers=self.arch.num_layers,
                seed=self.upcycling.seed,
                dense_statistics=lambda part: self.dense.statistics(expert.layer, copy, part),
                dense_neurons=lambda part, ids: self.dense.neurons(expert.layer, copy, part, ids),
            )
        )
        for part, data in expert.parts.items():
            scaled = values[part] * np.float32(getattr(scales, part))
            data[here].copy_(torch.from_numpy(scaled))
        return sum(data[here].nbytes for data in expert.parts.values())
