"""Any training loop can measure how experts and routers are."""

from pathlib import Path

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed.foldings import FOLDINGS
from tests.distributed.pool import RankPool
from tests.megatron import scenarios
from tests.megatron.grid import IDS, Grid


@pytest.mark.parametrize("name", ["EP2", "TP2-ETP1", "PP2-VPP2"])
def test_the_measures_are_the_same_on_any_mapping(
    ranks: RankPool, megatron_grid: Grid, name: str
) -> None:
    dense: Path = megatron_grid.dense("4 layers")
    given = {"dense": dense, "upcycling": UpcyclingConfig(), "ids": IDS}
    (expected,) = ranks.run(scenarios.health, 1, folding=ParallelFolding(), **given)
    found = ranks.run(scenarios.health, 2, folding=FOLDINGS[name].folding, **given)
    assert expected["moe/router_distance"] == 0
    assert expected["moe/expert_distance"] > 0.05
    assert {"moe/load_balancing_loss", "moe/expert_load_cv_layer_3"} <= expected.keys()
    for each in found:
        assert each.keys() == expected.keys()
        # Each rank's own part of a batch decides Megatron's auxiliary loss.
        same = {key: value for key, value in each.items() if "loss" not in key}
        assert same == pytest.approx({key: expected[key] for key in same}, rel=1e-4)
