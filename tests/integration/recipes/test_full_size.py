"""The full-size recipes: one factory, its own numbers each, and what each of them says."""

from dataclasses import replace
from typing import Any

import pytest
from nemo_upcycle_recipes.arguments import with_arguments
from nemo_upcycle_recipes.expectations import expected, workload
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2, RECIPES
from nemo_upcycle_recipes.scaled import scaled_schedule

from nemo_upcycle.config import RECOMPUTE
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.tuning import tune
from tests.integration.recipes.built import callbacks, megatrons_config

NEMOTRON = ("nemotron4_15b_e8g1t2", "nemotron4_15b_e8g8t8")
SMOLLM2 = ("smollm2_135m_e8t2", "smollm2_135m_dense")
MODULES = [name for name in RECIPES if name.endswith("e8t2") and "tiny" not in name]
SIBLINGS = [name for name in MODULES if name not in SMOLLM2]


def factory(name: str) -> Any:
    from nemo_upcycle_recipes.upcycled import FACTORIES

    return FACTORIES[name]


def recipe(of: str = "llama3_8b_e8t2", **arguments: Any) -> Any:
    return factory(of)(**arguments)


@pytest.mark.parametrize(
    ("name", "nemo", "same"),
    [
        ("llama32_1b_e8t2", "Llama32Config1B", ["rotary_base", "scale_factor"]),
        ("llama32_3b_e8t2", "Llama32Config3B", ["rotary_base", "scale_factor"]),
        ("llama31_70b_e8t2", "Llama31Config70B", ["rotary_base", "scale_factor"]),
        ("mistral_7b_e8t2", "MistralConfig7B", []),
        ("qwen25_7b_e8t2", "Qwen25Config7B", ["rotary_base", "add_qkv_bias", "vocab_size"]),
        ("nemotron4_15b_e8g1t2", "Nemotron4Config15B", ["rotary_percent", "activation_func"]),
    ],
)
def test_models_are_nemos(name: str, nemo: str, same: list[str]) -> None:
    """NeMo has the same models by hand."""
    from nemo.collections import llm

    by_hand, config = getattr(llm, nemo)(apply_rope_fusion=False), recipe(name).model.config
    for field in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "layernorm_epsilon",
        "share_embeddings_and_output_weights",
        *same,
    ):
        assert getattr(config, field) == getattr(by_hand, field), field


@pytest.mark.parametrize("name", [*MODULES, *NEMOTRON, "smollm2_135m_dense"])
def test_each_says_its_gpus_memory_and_step_time(name: str) -> None:
    numbers = RECIPES[name]
    prediction = expected(numbers, hardware("h100"))
    text = factory(name).__doc__
    assert f"On {numbers.world_size} H100" in text
    assert f"{prediction.memory.total / 2**30:.0f} GiB per GPU" in text
    assert f"{prediction.time.total:.2g} s per step" in text
    assert str(numbers.folding) in text


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_differ_from_the_paper_in_model_and_mapping_alone(name: str) -> None:
    built, paper = recipe(name), recipe()
    numbers = RECIPES[name]
    assert built.optim == paper.optim
    assert built.trainer.max_steps == paper.trainer.max_steps == 23842
    assert callbacks(built) == callbacks(paper)
    for field in ("num_moe_experts", "moe_router_topk", "moe_expert_capacity_factor"):
        assert getattr(built.model.config, field) == getattr(paper.model.config, field)
    strategy = built.trainer.strategy
    for field, value in numbers.folding.strategy_arguments.items():
        assert getattr(strategy, field) == value
    assert built.trainer.num_nodes * built.trainer.devices == numbers.world_size
    assert built.trainer.callbacks[-1].dense_checkpoint == numbers.checkpoint


def test_smollm2_is_scaled_from_the_paper_and_its_control_sees_the_same_tokens() -> None:
    """One GPU, the learning rate by the rule of the recipe `upcycle`, 100M tokens."""
    moe, control = (recipe(name) for name in SMOLLM2)
    schedule = RECIPES[SMOLLM2[0]].schedule
    dense = RECIPES[SMOLLM2[0]].dense_model
    rule = scaled_schedule(dense, 1, {"seq_length": 2048}, max_steps=schedule.max_steps)
    assert (schedule.lr, schedule.min_lr) == (rule.lr, rule.min_lr)
    assert schedule.warmup_steps == rule.warmup_steps
    assert 0 <= schedule.max_steps * 64 * 2048 - 100e6 < 64 * 2048
    assert dense.parameters == pytest.approx(134.5e6, rel=1e-3)
    assert (moe.trainer.num_nodes, moe.trainer.devices) == (1, 1)
    assert (moe.model.config.num_moe_experts, control.model.config.num_moe_experts) == (8, None)
    assert moe.model.config.share_embeddings_and_output_weights
    assert moe.data == control.data
    assert moe.optim == control.optim
    assert moe.trainer.max_steps == control.trainer.max_steps == schedule.max_steps


@pytest.mark.parametrize(
    ("name", "experts", "topk", "width"),
    [(*NEMOTRON[:1], 8, 2, 24576), (*NEMOTRON[1:], 64, 8, 3072)],
)
def test_nemotrons_are_the_second_papers(name: str, experts: int, topk: int, width: int) -> None:
    """What arXiv 2410.07524 and arXiv 2402.16819 state."""
    built, numbers = recipe(name), RECIPES[name]
    config, callback = built.model.config, built.trainer.callbacks[-1]
    assert (config.num_moe_experts, config.moe_router_topk) == (experts, topk)
    assert (config.moe_ffn_hidden_size, config.moe_router_pre_softmax) == (width, True)
    assert (config.moe_aux_loss_coeff, config.moe_z_loss_coeff) == (1e-2, None)
    assert (callback.weight_scaling, callback.router_initializer) == ("paper", "virtual_groups")
    assert numbers.upcycling.scales(gated=False).up == pytest.approx(
        4 ** (1 / 3) if topk == 2 else 4
    )
    assert built.data.seq_length * built.data.global_batch_size == 4 * 2**20
    assert (built.optim.config.lr, built.trainer.max_steps) == (3e-4, 238419)
    assert numbers.dense_model.parameters == pytest.approx(15.6e9, rel=0.01)


def test_the_nemotron_control_sees_the_same_tokens() -> None:
    moe, control = recipe(NEMOTRON[0]), recipe("nemotron4_15b_dense")
    assert (control.optim, control.trainer.max_steps) == (moe.optim, moe.trainer.max_steps)
    assert control.data == moe.data
    assert control.model.config.num_moe_experts is None


def test_what_watches_a_run() -> None:
    watching = ["TimingCallback", "MFUCallback", "PreemptionCallback"]
    then = ["FusedWeightGradients", "UpcyclingCallback"]
    assert callbacks(recipe()) == [*watching, "MoEHealthCallback", *then]
    dense = factory("llama3_8b_dense")()
    assert callbacks(dense) == [*watching, *then]


STATIC = {"moe_expert_capacity_factor": 2.0, "moe_pad_expert_input_to_capacity": True}


def test_cuda_graphs_are_megatrons_for_static_shapes() -> None:
    numbers = STATIC | {"recompute": "none", "cuda_graphs": True}
    built = recipe(**numbers)
    config = megatrons_config(recipe(**numbers, performance_mode=True))
    assert (config.cuda_graph_impl, config.cuda_graph_scope) == ("local", "full")
    assert config.use_te_rng_tracker
    assert built.trainer.strategy.use_te_rng_tracker
    # The Python of hooks is not replayed, and Megatron asks its own config about fusion.
    assert not {"MoEHealthCallback", "FusedWeightGradients"} & {*callbacks(built)}
    dense = factory("llama3_8b_dense")(cuda_graphs=True)
    assert dense.model.config.cuda_graph_impl == "local"
    assert "cuda_graph_impl" not in recipe().model.config.__arguments__


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"recompute": "none"}, "tokens per expert varies.*moe_pad_expert_input_to_capacity=True"),
        (STATIC, "recompute='moe', which Megatron-Core does not"),
    ],
)
def test_cuda_graphs_are_refused_where_shapes_vary(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        recipe(**numbers, cuda_graphs=True)


def test_cuda_graphs_are_refused_on_cpu_and_without_megatrons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nemo_upcycle_recipes import factory as of_all

    padded = with_arguments(LLAMA3_8B_E8T2, STATIC | {"recompute": "none"})
    with pytest.raises(UpcyclingError, match="cuda_graphs is set on CPU"):
        of_all._cuda_graphs(padded, cpu_only=True)
    monkeypatch.setattr(of_all, "fields", lambda _: ())
    with pytest.raises(UpcyclingError, match="has no cuda_graph_impl"):
        of_all._cuda_graphs(padded, cpu_only=False)


def test_performance_mode_hides_collectives() -> None:
    plain, fast = recipe(), recipe(performance_mode=True)
    added = [name for name in callbacks(fast) if name not in callbacks(plain)]
    assert added == ["GarbageCollectionCallback", "MegatronCommOverlapCallback"]
    assert callbacks(fast)[-1] == "UpcyclingCallback"

    def overlaps(**arguments: Any) -> bool:
        built = recipe(performance_mode=True, **arguments)
        (overlap,) = (c for c in built.trainer.callbacks if "tp_comm_overlap" in c.__arguments__)
        return overlap.tp_comm_overlap

    assert overlaps()
    assert not overlaps(tensor_model_parallel_size=1)
    for built in (plain, fast):
        assert built.trainer.strategy.ddp.overlap_grad_reduce
        assert built.trainer.strategy.ddp.overlap_param_gather


def test_performance_mode_needs_gpus() -> None:
    from nemo_upcycle_recipes import factory as of_all

    with pytest.raises(UpcyclingError, match="performance_mode is set on CPU"):
        of_all.pretrain(
            LLAMA3_8B_E8T2,
            dir=None,
            name="x",
            dense_checkpoint=None,
            tokenizer=None,
            data_paths=None,
            accelerator="cpu",
            performance_mode=True,
        )


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
        ({"recompute": "moe_act"}, {"recompute_modules": ["moe_act"]}),
        ({"recompute": "norm_act"}, {"recompute_modules": ["layernorm", "moe_act"]}),
        ({"recompute": "full"}, {"recompute_granularity": "full", "recompute_num_layers": 1}),
        ({"recompute": "none"}, {"recompute_granularity": None}),
        ({}, {"moe_grouped_gemm": True, "moe_permute_fusion": True}),
    ],
)
def test_recompute_and_kernels(arguments: dict[str, Any], fields: dict[str, Any]) -> None:
    config = recipe(**arguments).model.config
    for name, value in fields.items():
        assert getattr(config, name) == value


def test_batch_and_length_go_where_they_belong() -> None:
    built = recipe(seq_length=4096, global_batch_size=1024, micro_batch_size=2)
    assert built.model.config.seq_length == built.data.seq_length == 4096
    assert (built.data.global_batch_size, built.data.micro_batch_size) == (1024, 2)
    assert built.trainer.max_steps == 23842  # as many tokens a step, and in all
    assert recipe(global_batch_size=256).trainer.max_steps == 47684
    assert recipe(max_steps=7).trainer.max_steps == 7


def test_wandb_is_beside_tensorboard() -> None:
    assert recipe().log.wandb is None
    logged = recipe(wandb_project="moe", name="mine").log
    assert (logged.wandb.project, logged.wandb.name) == ("moe", "mine")
    assert (logged.wandb.id, logged.wandb.resume) == ("mine", "allow")
    assert logged.tensorboard is not None


def test_papers_variants() -> None:
    """Capacity factors and routers of arXiv 2412.09952, Tables 2 and 4 and the router ablation."""
    for factor in (1.0, 2.0, 4.0, None):
        config = recipe(moe_expert_capacity_factor=factor).model.config
        assert config.moe_expert_capacity_factor == factor
    assert recipe(moe_router_pre_softmax=True).model.config.moe_router_pre_softmax


def test_bad_recompute_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="recompute is 'everything'; expected one of: none"):
        recipe(recompute="everything")
    with pytest.raises(UpcyclingError, match="has no experts"):
        replace(RECIPES["llama3_8b_dense"], recompute="moe")


@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("fp8", {"fp8": "hybrid", "fp8_recipe": "tensorwise", "num_layers_at_end_in_bf16": 1}),
        ("mxfp8", {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
    ],
)
def test_fp8_is_of_the_model_and_of_the_precision(precision: str, fields: dict[str, Any]) -> None:
    """NeMo's plug-in overwrites the model's fields with its own; parameters stay in bf16."""
    built = recipe(precision=precision)
    for name, value in fields.items():
        assert getattr(built.model.config, name) == getattr(built.trainer.plugins, name) == value
    assert built.model.config.moe_router_padding_for_fp8
    assert built.trainer.plugins.precision == "bf16-mixed"
    assert built.optim.config.bf16
    dense = recipe("llama3_8b_dense", precision=precision).model.config
    assert dense.fp8
    assert not dense.moe_router_padding_for_fp8
    assert recipe().model.config.fp8 is None


def test_fp8_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UpcyclingError, match="precision is 'fp4'; expected one of: bf16-mixed"):
        recipe(precision="fp4")
    with pytest.raises(UpcyclingError, match="cannot pad the experts' tokens for FP8"):
        recipe(precision="fp8", moe_token_dispatcher_type="allgather")


def test_the_optimizer_is_stored_as_told() -> None:
    import torch

    built = recipe()
    assert not hasattr(built.optim.config, "optimizer_cpu_offload") or (
        not built.optim.config.optimizer_cpu_offload
    )
    assert not built.trainer.strategy.distrib_optim_fully_reshardable_mem_efficient
    assert "OffloadedOptimizer" not in callbacks(built)

    built = recipe(optimizer_offload_fraction=0.75, grad_reduce_in_fp32=False)
    config, strategy = built.optim.config, built.trainer.strategy
    assert config.use_precision_aware_optimizer and config.optimizer_cpu_offload
    assert not config.store_param_remainders
    assert config.optimizer_offload_fraction == 0.75
    assert config.main_grads_dtype == torch.bfloat16
    assert not strategy.ddp.grad_reduce_in_fp32
    assert not built.trainer.plugins.grad_reduce_in_fp32
    assert strategy.distrib_optim_fully_reshardable_mem_efficient
    names = callbacks(built)
    assert names.index("OffloadedOptimizer") < names.index("UpcyclingCallback")

    for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.uint8)):
        config = recipe(optimizer_state=name).optim.config
        assert config.exp_avg_dtype == config.exp_avg_sq_dtype == dtype
        assert config.use_precision_aware_optimizer and not config.store_param_remainders
        assert not config.optimizer_cpu_offload


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", [*MODULES, *NEMOTRON])
def test_megatron_takes_every_recipe(name: str, recompute: str) -> None:
    config = megatrons_config(recipe(name, recompute=recompute, performance_mode=True))
    assert config.moe_grouped_gemm
    assert config.expert_model_parallel_size == RECIPES[name].folding.expert_model_parallel_size


def test_megatron_takes_what_the_planner_finds() -> None:
    h100 = hardware("h100")
    for one in tune(workload(LLAMA3_8B_E8T2), 128, h100).best[::25]:
        sizes = vars(one.mapping.folding) | {"num_nodes": 16, "recompute": one.mapping.recompute}
        megatrons_config(recipe(**sizes, micro_batch_size=one.mapping.micro_batch_size))
