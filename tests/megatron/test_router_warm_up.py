"""The warm-up of routers in a loop like Megatron-LM's, through Megatron-Bridge's event."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.megatron import RouterWarmUp
from nemo_upcycle.megatron.run import read_origin
from tests.distributed.pool import RankPool
from tests.megatron import loop
from tests.megatron.scenarios import UPCYCLING

COMMAND = {
    "folding": ParallelFolding.of(tp=2, ep=2),
    "upcycling": replace(
        UPCYCLING,
        initializer="drop",
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.1,
    ),
    "warm_up": 3,
}


def test_only_routers_change_and_a_resume_continues(
    ranks: RankPool, dense: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    first = ranks.run(loop.train, 2, dense=dense, run=run, steps=2, **COMMAND)
    assert all(".mlp.router." in name for each in first for name in each["changed"])
    assert sum("weight" in name for name in first[0]["changed"]) == 4
    resumed = ranks.run(loop.train, 2, dense=dense, run=run, steps=5, **COMMAND)
    expected = ranks.run(loop.train, 2, dense=dense, run=whole, steps=5, **COMMAND)
    for one, other in zip(resumed, expected, strict=True):
        assert one["losses"] == {step: other["losses"][step] for step in (3, 4, 5)}
        assert any(".experts." in name for name in one["changed"])
    # The record says so, and a resume with other steps, or none, is refused.
    assert read_origin(run).settings == {"router_warmup_steps": 3}
    for other in (4, None):
        refused = ranks.run(
            loop.train, 2, dense=dense, run=run, steps=6, **COMMAND | {"warm_up": other}
        )
        assert all(
            f"was trained with router_warmup_steps=3; now router_warmup_steps={other or 0}"
            in each["error"]
            for each in refused
        )


def test_a_number_of_steps_is_checked() -> None:
    with pytest.raises(UpcyclingError, match="router_warmup_steps is 0"):
        RouterWarmUp(0)
