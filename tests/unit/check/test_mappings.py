"""The mappings that a check runs over."""

import pytest

from nemo_upcycle.check.mappings import mappings
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.families import architecture_of
from tests.stacks import CONFIG

UPCYCLING = UpcyclingConfig()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 16, 24, 512])
def test_each_divides_the_ranks(world_size: int) -> None:
    found = mappings(architecture_of(CONFIG), UPCYCLING, world_size)
    assert found[0] == ParallelFolding()
    assert len(set(found)) == len(found)
    for folding in found:
        folding.validate(world_size, UPCYCLING.num_moe_experts)


def test_one_rank_has_one_mapping() -> None:
    assert mappings(architecture_of(CONFIG), UPCYCLING, 1) == [ParallelFolding()]


@pytest.mark.parametrize(("world_size", "least"), [(2, 10), (4, 14), (8, 14)])
def test_all_kinds_are_there(world_size: int, least: int) -> None:
    found = mappings(architecture_of(CONFIG), UPCYCLING, world_size)
    assert len(found) >= least
    for name in ParallelFolding.NAMES.values():
        assert any((getattr(folding, name) or 1) > 1 for folding in found), name
    assert any(
        folding.tensor_model_parallel_size != folding.expert_tensor_parallel_size > 1
        for folding in found
    )


def test_a_model_that_does_not_divide_has_fewer() -> None:
    three = architecture_of(CONFIG | {"num_hidden_layers": 3})
    assert all(f.pipeline_model_parallel_size == 1 for f in mappings(three, UPCYCLING, 8))
