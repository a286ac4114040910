"""What the recipes say."""

from pathlib import Path

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2


def test_paper_numbers() -> None:
    """Every number that arXiv 2412.09952 states of its run."""
    schedule, folding = LLAMA3_8B_E8T2.schedule, LLAMA3_8B_E8T2.folding
    upcycling = LLAMA3_8B_E8T2.upcycling
    assert (upcycling.num_moe_experts, upcycling.moe_router_topk) == (8, 2)
    assert upcycling.moe_expert_capacity_factor == 4
    assert not upcycling.moe_router_pre_softmax
    assert upcycling.exactness().exact
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


def test_shipped_config_is_llama3_8b() -> None:
    """NeMo has the same model by hand."""
    from nemo.collections.llm import Llama3Config8B

    nemo, arch = Llama3Config8B(apply_rope_fusion=False), LLAMA3_8B_E8T2.architecture
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "layernorm_epsilon",
        "rotary_base",
        "share_embeddings_and_output_weights",
    ):
        assert getattr(arch, name) == getattr(nemo, name), name


def test_model_is_made_from_the_checkpoint_at_hand(dense: Path) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    config = upcycled_recipe(dense_checkpoint=str(dense)).model.config
    assert (config.hidden_size, config.ffn_hidden_size, config.vocab_size) == (64, 96, 256)
    assert upcycled_recipe().model.config.hidden_size == 128


@pytest.mark.parametrize("accelerator", ["gpu", "cpu"])
def test_accelerator_decides_the_strategy(accelerator: str) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    recipe = upcycled_recipe(accelerator=accelerator)
    strategy = recipe.trainer.strategy.__fn_or_cls__.__name__
    assert strategy == {"gpu": "MegatronStrategy", "cpu": "CpuMegatronStrategy"}[accelerator]
    fusion_said = "apply_rope_fusion" in recipe.model.config.__arguments__
    assert fusion_said == (accelerator == "cpu")


def test_expert_tensor_parallelism_is_always_said() -> None:
    """Left unset, NeMo takes TP for it, which splits every expert."""
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    recipe = upcycled_recipe(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    assert recipe.trainer.strategy.expert_tensor_parallel_size == 1
    assert recipe.trainer.strategy.sequence_parallel is True
