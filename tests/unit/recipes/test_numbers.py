"""Every recipe's numbers are those of its source."""

from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2


def test_paper_numbers() -> None:
    """Every number that arXiv 2412.09952 states of its run."""
    schedule, folding = LLAMA3_8B_E8T2.schedule, LLAMA3_8B_E8T2.folding
    upcycling = LLAMA3_8B_E8T2.upcycling
    assert (upcycling.num_moe_experts, upcycling.moe_router_topk) == (8, 2)
    assert upcycling.moe_expert_capacity_factor == 4
    assert not upcycling.moe_router_pre_softmax
    assert upcycling.exactness(gated=True, dense_checkpoints=1).exact
    assert (schedule.lr, schedule.min_lr, schedule.warmup_steps) == (3e-5, 3e-7, 100)
    tokens = schedule.max_steps * schedule.tokens_per_step
    assert 0 <= tokens - 100e9 < schedule.tokens_per_step
    assert LLAMA3_8B_E8T2.num_nodes * LLAMA3_8B_E8T2.num_gpus_per_node == 512
    assert folding.tensor_model_parallel_size == 2
    assert folding.expert_model_parallel_size == 8
    assert folding.expert_tensor_parallel_size == 1
    assert folding.pipeline_model_parallel_size == 4
    assert folding.virtual_pipeline_model_parallel_size == 8
    folding.validate(512, 8)
