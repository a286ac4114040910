"""The callback for Megatron-Bridge, and what any other loop calls."""

from pathlib import Path

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.megatron import TrainingMetrics
from tests.distributed.foldings import FOLDINGS
from tests.distributed.pool import RankPool
from tests.megatron import events
from tests.megatron.grid import IDS, Grid

MFU = {"tflops_per_gpu", "mfu", "mfu_full_attention"}
STEPS, EVERY = 8, 3


@pytest.fixture(scope="module")
def dense(megatron_grid: Grid) -> Path:
    return megatron_grid.dense("4 layers")


def test_bridges_events_log_health_and_utilization(ranks: RankPool, dense: Path) -> None:
    *others, last = ranks.run(
        events.logged,
        2,
        dense=dense,
        folding=FOLDINGS["PP2-VPP2"].folding,
        upcycling=UpcyclingConfig(),
        ids=IDS,
        steps=STEPS,
        every_n_steps=EVERY,
    )
    assert others == [{"tensorboard": {}, "wandb": {}}]
    found = last["tensorboard"]
    measured = [step for step in found if "moe/expert_load_cv" in found[step]]
    assert measured == [step for step in range(STEPS) if step % EVERY == 0]
    assert found[EVERY]["moe/router_distance"] == 0
    assert {"moe/load_balancing_loss", "moe/dead_experts_layer_3"} <= found[EVERY].keys()
    # The first step is not timed, nor are those that an evaluation or a checkpoint comes before.
    untimed = (0, events.EVALUATED_AFTER + 1, events.SAVED_AFTER + 1)
    timed = [step for step in range(STEPS) if step not in untimed]
    assert [step for step in found if found[step].keys() >= MFU] == timed
    for step in timed:
        assert found[step]["mfu"] == pytest.approx(found[step]["tflops_per_gpu"] / 0.5)
    assert {step: values for step, values in last["wandb"].items() if values} == found


def test_a_dense_model_has_no_experts_to_measure(ranks: RankPool, dense: Path) -> None:
    (found,) = ranks.run(
        events.logged,
        1,
        dense=dense,
        folding=ParallelFolding(),
        upcycling=UpcyclingConfig(num_moe_experts=None),
        ids=IDS,
        steps=2,
        every_n_steps=1,
    )
    assert found["tensorboard"].keys() == {1}
    assert found["tensorboard"][1].keys() == MFU


def test_a_number_of_steps_is_checked() -> None:
    with pytest.raises(UpcyclingError, match="every_n_steps is 0"):
        TrainingMetrics(every_n_steps=0)
