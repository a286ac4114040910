"""A recipe's arguments, as users type them."""

from dataclasses import replace

import pytest
from nemo_upcycle_recipes.arguments import override
from nemo_upcycle_recipes.numbers import RECIPES

from nemo_upcycle.errors import UpcyclingError

PAPER = RECIPES["llama3_8b_e8t2"]


def test_arguments_as_they_are_typed() -> None:
    found = override(
        PAPER,
        [
            "trainer.strategy.tensor_model_parallel_size=4",
            "trainer.num_nodes=2",
            "trainer.devices=4",
            "trainer.plugins.precision='32'",
            "model.config.moe_expert_capacity_factor=None",
            "virtual_pipeline_model_parallel_size=none",
            "account_for_loss_in_pipeline_split=true",
            "num_moe_experts=16",
        ],
    )
    assert found.folding == replace(
        PAPER.folding,
        tensor_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=None,
        account_for_loss_in_pipeline_split=True,
    )
    assert found.upcycling == replace(
        PAPER.upcycling, num_moe_experts=16, moe_expert_capacity_factor=None
    )
    assert (found.num_nodes, found.num_gpus_per_node, found.precision) == (2, 4, "32")
    assert override(PAPER, ["moe_expert_capacity_factor=2"]).upcycling.can_drop_tokens


def test_world_size_fills_nodes() -> None:
    sizes = [PAPER.on_ranks(n) for n in (128, 4)] + [RECIPES["llama_tiny"].on_ranks(4)]
    assert [(r.num_nodes, r.num_gpus_per_node) for r in sizes] == [(16, 8), (1, 4), (1, 4)]
    with pytest.raises(UpcyclingError, match="12 ranks do not fill nodes"):
        PAPER.on_ranks(12)
