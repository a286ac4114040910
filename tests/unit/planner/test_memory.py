"""Memory of the paper's model, by hand and against the plan."""

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

from nemo_upcycle.checkpoint.described import dense_of_config
from nemo_upcycle.config import RECOMPUTE, ParallelFolding
from nemo_upcycle.planner.memory import memory
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.workload import Mapping
from nemo_upcycle.plans.job import plan_job
from tests.planning import PAPER, QUICK_HOST, paper_mapping


def test_more_recompute_keeps_less_and_takes_longer() -> None:
    mappings = [paper_mapping(recompute=name) for name in RECOMPUTE]
    kept = [memory(PAPER, each).activations for each in mappings]
    times = [step_time(PAPER, each, QUICK_HOST).total for each in mappings]
    assert kept == sorted(kept, reverse=True)
    assert times == sorted(times)
    assert len(set(kept)) == len(set(times)) == len(RECOMPUTE)


def test_full_recompute_keeps_a_layers_input() -> None:
    """What is kept can be counted by hand: PP1, one microbatch, bf16."""
    folding = ParallelFolding.of(tp=2, cp=2, ep=8)
    used = memory(PAPER, Mapping(folding, 128, recompute="full"))
    assert used.activations == 32 * 2 * 4096 * 8192 / (2 * 2)


def test_sharded_optimizer_shrinks_with_data_parallelism_and_the_rest_does_not() -> None:
    one, many = (memory(PAPER, paper_mapping(world_size=size)) for size in (128, 512))
    assert one.parameters == pytest.approx(many.parameters, rel=1e-4)
    assert one.gradients == 2 * one.parameters
    assert one.optimizer == pytest.approx(4 * many.optimizer, rel=1e-3)


def test_parameters_are_those_of_the_plan() -> None:
    dense = dense_of_config(LLAMA3_8B_E8T2.config, "", "")
    job = plan_job(dense, PAPER.upcycling, LLAMA3_8B_E8T2.folding, 64, 8)
    planned = max(owner.bytes_to_write for owner in job.owners)
    assert memory(PAPER, paper_mapping()).parameters == pytest.approx(planned, rel=1e-4)
