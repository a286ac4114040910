"""The shards of a Megatron-Core model on this rank, according to Megatron itself.

`sharded_state_dict()` gives each shard's offset in the whole parameter. The data are views of the
parameter, so that writing a shard writes the parameter in place.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.plans.rank import Shard

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor

_STACKED_LAYERS = re.compile(r"^decoder\.layers\.(?!\d)")
_STACKED_EXPERTS = ".mlp.experts.experts."


@dataclass(frozen=True)
class OwnedShard:
    """A shard, and the view of the parameter that holds the shard."""

    shard: Shard
    data: torch.Tensor


def owned_shards(module: torch.nn.Module) -> list[OwnedShard]:
    """Return the shards of a Megatron-Core model on this rank.

    Experts may be separate modules (SequentialMLP), separate weights (TEGroupedMLP), or
    transposed parts of one weight (legacy GroupedMLP).

    Raises:
        UpcyclingError: A parameter is not covered exactly once by views of itself.
    """
    state: ShardedStateDict = module.sharded_state_dict(metadata=_groups(module))
    owned = [own for tensor in _sharded_tensors(state.values()) for own in _owned(tensor)]
    _check_coverage(module, owned)
    return owned


def _groups(module: torch.nn.Module) -> dict[str, Any] | None:
    """Return the model's own process groups where it has been given some.

    Newer versions of Megatron-Core would otherwise look into its global state.
    """
    group = getattr(getattr(module, "pg_collection", None), "dp_cp", None)
    return None if group is None else {"dp_cp_group": group}


class _View(torch.Tensor):
    """A parameter whose parts stay views even if Megatron calls `contiguous()`.

    The legacy GroupedMLP describes its transposed weights by contiguous copies, which would not
    write to the parameter.
    """

    def contiguous(self, *_: Any, **__: Any) -> "_View":
        return self


def _sharded_tensors(values: Iterable[object]) -> Iterator["ShardedTensor"]:
    """Yield the sharded tensors; factories split fused parameters (gate and up) into views."""
    # Here, so that initializers, which need an OwnedShard alone, do not wait for Megatron-Core.
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in values:
        if isinstance(value, ShardedTensorFactory):
            data = value.data.detach().as_subclass(_View)
            built = value.build_fn(value.key, data, value.replica_id, value.flattened_range)
            yield from _sharded_tensors(built if isinstance(built, list) else [built])
        elif isinstance(value, ShardedTensor):
            yield value


def _owned(tensor: "ShardedTensor") -> Iterator[OwnedShard]:
    """Yield a tensor's shards: one, or one per expert for a tensor with several experts."""
    name, skip = tensor.key, tensor.prepend_axis_num
    prepended = list(tensor.global_offset[:skip])
    data = tensor.data.detach().as_subclass(torch.Tensor)
    if _STACKED_LAYERS.match(name):
        name = _STACKED_LAYERS.sub(f"decoder.layers.{prepended.pop(0)}.", name)
    global_shape, offset = tensor.global_shape[skip:], tensor.global_offset[skip:]
    if _STACKED_EXPERTS not in name:
        yield OwnedShard(Shard(name, tuple(global_shape), tuple(offset), tuple(data.shape)), data)
        return
    if prepended:  # one expert, by its axis
        offset, data = (prepended.pop(0), *offset), data[None]
        global_shape = (0, *global_shape)
    for index, expert in enumerate(data):
        expert_name = name.replace(_STACKED_EXPERTS, f".mlp.experts.{offset[0] + index}.")
        shard = Shard(expert_name, tuple(global_shape[1:]), tuple(offset[1:]), tuple(expert.shape))
        yield OwnedShard(shard, expert)


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
            "This version of Megatron-Core describes them in an unknown way; please report this."
        )
