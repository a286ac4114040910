"""Shards of all ranks are put together only if each element is there, and the same wherever."""

import pytest
import torch

from nemo_upcycle.plans.rank import Shard
from tests.distributed.grid import assemble

VALUES = torch.arange(12.0).view(4, 3)


def shard(start: int, stop: int) -> Shard:
    """Return the place of some rows of a parameter."""
    return Shard("weight", (4, 3), (start, 0), (stop - start, 3))


def test_shards_and_their_replicas_are_whole() -> None:
    assembled = assemble([(shard(0, 3), VALUES[:3]), (shard(1, 4), VALUES[1:])])
    assert not assembled.problems
    assert torch.equal(assembled.parameters["weight"], VALUES)


@pytest.mark.parametrize("other", [99.0, float("nan")])
def test_another_value_on_another_rank_is_a_problem(other: float) -> None:
    replica = VALUES[1:].clone()
    replica[0, 0] = other
    assembled = assemble([(shard(0, 3), VALUES[:3]), (shard(1, 4), replica)])
    assert assembled.problems == ["weight differs between ranks"]


def test_a_hole_is_a_problem() -> None:
    assembled = assemble([(shard(0, 1), VALUES[:1]), (shard(2, 4), VALUES[2:])])
    assert assembled.problems == ["weight is not whole"]
