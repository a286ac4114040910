"""How far experts are from each other, and routers from where they began."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_upcycle.engine.owned_shards import OwnedShard
from nemo_upcycle.families.fields import experts_in
from nemo_upcycle.families.model import upcycling_of
from nemo_upcycle.families.names import expert_of, is_router, layer_of

SAMPLED_ROWS = 64
"""Rows compared of each expert's linear_fc1: enough for a distance, and cheap."""


class Moved:
    """Distances between experts, and of routers from the initial routers, from sums over ranks.

    Experts that are shards of the dense layer are compared with the copies of the same shard.
    """

    def __init__(
        self,
        owned: list[OwnedShard],
        first_router: Callable[[int], torch.Tensor] | None,
        config: Any,
    ) -> None:
        experts = experts_in(vars(config))
        width = experts.expert_width
        self._shards = upcycling_of(experts, config.ffn_hidden_size).granularity
        self._copies = config.num_moe_experts // self._shards
        rows = width * (2 if config.gated_linear_unit else 1)
        self._stride, self._hidden = max(1, rows // SAMPLED_ROWS), config.hidden_size
        device = owned[0].data.device
        # One position per sampled row of an expert, whatever the mapping.
        size = -(-rows // self._stride) * self._hidden
        # For similar experts the distance is a small difference of large sums, hence fp64.
        zeros = partial(torch.zeros, device=device, dtype=torch.float64)
        self._sum_of_copies = zeros(config.num_layers, self._shards, size)
        self._squares = zeros(config.num_layers, 3)
        if parallel_state.get_expert_data_parallel_rank() == 0:
            for own in filter(_is_fc1, owned):
                self._add_expert(own)
        if first_router is not None and first_with_its_router():
            for own in owned:
                if is_router(own.shard.name):
                    self._add_router(own, first_router)
        self.sums = (self._sum_of_copies, self._squares)

    def _add_expert(self, own: OwnedShard) -> None:
        layer, expert = layer_of(own.shard.name) or 0, expert_of(own.shard.name) or 0
        first = own.shard.offset[0]
        start = -first % self._stride
        values = own.data.detach()[start :: self._stride].double().flatten()
        place = (first + start) // self._stride * self._hidden
        copies = self._sum_of_copies[layer, expert % self._shards]
        copies[place : place + len(values)] += values
        self._squares[layer, 0] += values.square().sum()

    def _add_router(self, own: OwnedShard, first_router: Callable[[int], torch.Tensor]) -> None:
        layer = layer_of(own.shard.name) or 0
        before = first_router(layer).to(own.data)
        self._squares[layer, 1] += (own.data.detach() - before).double().square().sum()
        self._squares[layer, 2] += before.double().square().sum()

    def distances(self) -> dict[str, torch.Tensor]:
        """Return both distances per layer; the sums must already be reduced over all ranks.

        For n copies: Σ over pairs |a - b|² = n·Σ|a|² - |Σ a|².
        """
        copies = self._copies
        squares_L, moved_L, began_L = self._squares.T
        pairs_L = copies * squares_L - self._sum_of_copies.square().sum((1, 2))
        mean_L = 2 * pairs_L.clamp(min=0) / max(1, copies * (copies - 1))
        squares_L = torch.where(squares_L > 0, squares_L, torch.nan)
        measures = {"expert_distance": (mean_L / (squares_L / copies)).sqrt()}
        if began_L.any():
            began_L = torch.where(began_L > 0, began_L, torch.nan)
            measures["router_distance"] = (moved_L / began_L).sqrt()
        return measures


def _is_fc1(own: OwnedShard) -> bool:
    return expert_of(own.shard.name) is not None and "linear_fc1.weight" in own.shard.name


def first_with_its_router() -> bool:
    """Return whether this rank is the first of the ranks with the same routers."""
    return (
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )
