"""Nodes of a job."""

from dataclasses import replace

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.nodes import nodes_of, of_job, with_nodes
from tests.planning import H100


@pytest.mark.parametrize(
    ("gpus", "nodes"), [(1, (1, 1)), (4, (1, 4)), (7, (1, 7)), (12, (2, 6)), (20, (4, 5))]
)
def test_nodes_have_exactly_these_gpus(gpus: int, nodes: tuple[int, int]) -> None:
    assert nodes_of(gpus, 8) == nodes


@pytest.mark.parametrize(
    ("gpus", "others"),
    [(13, r"12 \(2 nodes of 6\) or 14 \(2 nodes of 7\)"), (17, r"16 .* or 18"), (0, "0 GPUs")],
)
def test_nodes_are_used_by_half_at_least(gpus: int, others: str) -> None:
    with pytest.raises(UpcyclingError, match=others):
        nodes_of(gpus, 8)


def test_what_is_proposed_works() -> None:
    with pytest.raises(UpcyclingError, match=r"Use 8 \(1 node of 8\) or 16 \(2 nodes of 8\)\."):
        nodes_of(13, 8, lambda gpus: gpus in (8, 16))


def test_nvlink_joins_only_the_gpus_in_use() -> None:
    assert of_job(H100, 12).nvlink_domain == 6
    assert of_job(H100, 4) == of_job(H100, 64) == H100
    assert with_nodes(hardware("gb200"), 3).nvlink_domain == 54
    pairs = replace(H100, nvlink_domain=2)
    assert with_nodes(pairs, 6).nvlink_domain == 2
    with pytest.raises(UpcyclingError, match="a node of H100 has 8 GPUs; use 1 to 8"):
        with_nodes(H100, 9)
