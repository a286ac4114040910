"""Scaling over numbers of GPUs."""

from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

from nemo_upcycle.checkpoint.described import dense_of_config
from nemo_upcycle.planner.scaling import scaling
from nemo_upcycle.plans.job import plan_job
from tests.planning import H100, PAPER


def test_scaling_loads_what_the_plan_says() -> None:
    dense = dense_of_config(LLAMA3_8B_E8T2.config, "", "")
    small, large = scaling(PAPER, dense, H100, (4, 8, 16))
    assert (small.gpus, large.gpus) == (8, 16)
    assert small.best is None
    assert small.least is not None
    assert not small.least.fits
    assert large.best is not None
    assert large.loading is not None
    job = plan_job(dense, PAPER.upcycling, large.best.mapping.folding, 2, 8)
    assert large.loading.bytes_of_node == max(job.bytes_of_nodes)
    assert large.loading.bytes_of_job == sum(job.bytes_of_nodes)
