"""What one mapping saves, any other loads, bit by bit."""

import pytest

from tests.distributed import scenarios
from tests.distributed.foldings import FOLDINGS, ONE_RANK, marks
from tests.distributed.grid import Grid
from tests.distributed.whole import differing, whole

PAIRS = [
    ("1 rank, 4 layers", "PP2-TP2-EP2-ETP1"),
    ("PP2-TP2-EP2-ETP1", "1 rank, 4 layers"),
    ("EP4", "PP4"),
    ("PP4", "CP2-DP2-EP2"),
    ("TP4-ETP4", "EP2-ETP2"),
    ("EP2-ETP2", "TP2-DP2-EP4-ETP1"),
    ("TP2-DP2-ETP4", "TP4-EP4-ETP1"),
    ("ETP2", "TP2-ETP1"),
    ("ETP4", "DP4"),
    ("TP2-CP2-ETP1", "PP2-CP2-EP2"),
    ("CP4", "PP2-VPP2-EP2"),
    ("PP2-VPP2-TP2-EP2-ETP1", "CP2-ETP2"),
    ("PP2-VPP2-CP2", "PP2-first1"),
    ("PP2-last1", "PP2-VPP2"),
    ("PP2-VPP2-ends", "PP4-first1-last1"),
    ("PP4-ends", "1 rank, 6 layers"),
    ("PP4-VPP2", "1 rank, 8 layers"),
    ("PP2-TP2-ETP2-tied", "PP2-tied"),
    ("TP2-tied", "PP2-TP2-ETP2-tied"),
]
"""Saved under, loaded under."""


@pytest.mark.parametrize(
    ("source", "target"),
    [pytest.param(*pair, marks=marks(pair[0])) for pair in PAIRS],
)
def test_any_mapping_loads_what_another_saved(grid: Grid, source: str, target: str) -> None:
    grid.run(source)
    spread = (FOLDINGS | ONE_RANK)[target]
    ranks = grid.call(scenarios.loaded, spread, saved=grid.saved(source))
    expected = grid.run(f"1 rank, {spread.dense}").weights["huggingface"].parameters
    assert differing(whole(shard for rank in ranks for shard in rank), expected) == []
