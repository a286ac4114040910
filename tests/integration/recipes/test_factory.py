"""What the recipes say."""

from pathlib import Path
from typing import Any

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_DENSE, LLAMA3_8B_E8T2

from nemo_upcycle.errors import UpcyclingError
from tests.moe_models import write_moe
from tests.tiny import LLAMA31_ROPE, into_hub_cache, write_llama


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


def test_an_moe_gives_its_architecture_to_a_run_without_its_weights(tmp_path: Path) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    moe = str(write_moe(tmp_path / "moe", "mixtral"))
    experts = {"num_moe_experts": 4, "dense_checkpoint": moe}
    config = upcycled_recipe(from_scratch=True, **experts).model.config
    assert (config.hidden_size, config.moe_ffn_hidden_size, config.vocab_size) == (64, 96, 256)
    with pytest.raises(UpcyclingError, match=r"other experts .*; expected num_moe_experts=4\."):
        upcycled_recipe(from_scratch=True, dense_checkpoint=moe)
    with pytest.raises(UpcyclingError, match=r"upcycle .*moe LARGER --experts N.* import model="):
        upcycled_recipe(**experts)


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """One checkpoint under all the names that people give it; its RoPE base is no recipe's."""
    import huggingface_hub.constants

    home = tmp_path / "home"
    dense = write_llama(home / "models" / "dense", rope_theta=5e5)
    into_hub_cache(dense, tmp_path / "hub", "some-org/some-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return {
        "a path": str(dense),
        "a hub name": "some-org/some-model",
        "home": "~/models/dense",
        "relative": "models/dense",
        "two": "some-org/some-model; ~/models/dense",
        "two, one of them elsewhere": "/only/on/nodes; ~/models/dense",
    }


NAMES = ("a path", "a hub name", "home", "relative", "two", "two, one of them elsewhere")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:/only/on/nodes cannot be read")
def test_a_checkpoint_is_the_same_by_any_name(named: dict[str, str], name: str) -> None:
    from nemo_upcycle_recipes.llama_tiny import dense_recipe, upcycled_recipe
    from nemo_upcycle_recipes.upcycled import FACTORIES

    one_stage = {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None}
    for factory, options in (
        (dense_recipe, {}),
        (upcycled_recipe, {}),
        (upcycled_recipe, {"from_scratch": True}),
        (FACTORIES["llama3_8b_e8t2"], one_stage),
    ):
        config = factory(dense_checkpoint=named[name], tokenizer="t", **options).model.config
        assert (config.rotary_base, config.hidden_size, config.vocab_size) == (5e5, 64, 256)


def test_a_hub_name_keeps_its_rope_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from nemo_upcycle_recipes.llama_tiny import dense_recipe, upcycled_recipe

    dense = write_llama(tmp_path / "dense", rope_scaling=LLAMA31_ROPE)
    into_hub_cache(dense, tmp_path / "hub", "some-org/llama-3.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for factory in (dense_recipe, upcycled_recipe):
        config = factory(dense_checkpoint="some-org/llama-3.1").model.config
        assert (config.scale_factor, config.old_context_len) == (4.0, 32)


@pytest.mark.parametrize("source", ["/only/on/nodes", "some-org/not-downloaded", "~/gone"])
@pytest.mark.parametrize("from_scratch", [False, True])
def test_what_is_assumed_of_a_checkpoint_elsewhere_is_said(source: str, from_scratch: bool) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe
    from nemo_upcycle_recipes.recipe import AssumedModel

    with pytest.warns(AssumedModel) as said:
        recipe = upcycled_recipe(dense_checkpoint=source, from_scratch=from_scratch)
    (text,) = [str(warning.message) for warning in said if warning.category is AssumedModel]
    assert text.startswith(f"{source} cannot be read on this machine")
    assert "the recipe's own, llama_tiny (4 layers, hidden_size 128" in text
    assert recipe.model.config.hidden_size == 128


def test_nothing_is_assumed_of_what_is_here(tmp_path: Path) -> None:
    """A directory without a config is no reason to take the recipe's own numbers."""
    from nemo_upcycle_recipes.llama_tiny import dense_recipe

    (tmp_path / "file").touch()
    for source, message in (
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "file"), "is a file"),
        ("", "expected one checkpoint"),
    ):
        with pytest.raises(UpcyclingError, match=message):
            dense_recipe(dense_checkpoint=source)


def test_the_recipes_own_checkpoint_is_not_remarked_on() -> None:
    import warnings

    from nemo_upcycle_recipes.recipe import AssumedModel
    from nemo_upcycle_recipes.upcycled import FACTORIES

    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumedModel)
        FACTORIES["llama3_8b_e8t2"]()


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


def test_a_factory_takes_all_ways_of_upcycling() -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    recipe = upcycled_recipe(
        granularity=4,
        moe_router_topk=8,
        initializer="drop(ratio=0.3)",
        moe_layer_freq="[0]+[1]*3",
        moe_shared_expert=True,
        moe_z_loss_coeff=1e-3,
        moe_aux_loss_coeff=0.0,
        router_init_std=0.01,
        weight_scaling="paper",
    )
    config, callback = recipe.model.config, recipe.trainer.callbacks[-1]
    assert (config.num_moe_experts, config.moe_ffn_hidden_size) == (32, 64)
    assert config.moe_layer_freq == [0, 1, 1, 1]
    assert config.moe_shared_expert_intermediate_size == 256
    assert (config.moe_z_loss_coeff, config.moe_aux_loss_coeff) == (1e-3, 0.0)
    assert callback.initializer == "drop(ratio=0.3)"
    assert (callback.router_init_std, callback.weight_scaling) == (0.01, "paper")


@pytest.mark.parametrize(
    ("values", "experts"),
    [
        ({}, 8),
        ({"granularity": 2, "moe_router_topk": 4}, 16),
        ({"expansion_rate": 4}, 4),
        ({"expansion_rate": 4, "granularity": 2}, 8),
        ({"num_moe_experts": 4}, 4),
        ({"num_moe_experts": 8, "granularity": 4, "expansion_rate": 2}, 8),
    ],
)
def test_experts_are_expansion_rate_times_granularity(values: dict, experts: int) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    assert upcycled_recipe(**values).model.config.num_moe_experts == experts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"initializer": "dorp"}, "no initializer 'dorp'"),
        ({"initializer": "drop(ratio=2)"}, "from 0 to 1"),
        ({"granularity": 5, "moe_router_topk": 5}, "ffn_hidden_size=256 does not divide"),
        ({"granularity": 4, "num_moe_experts": 10}, "a granularity that divides"),
        ({"granularity": 2, "num_moe_experts": 8, "expansion_rate": 8}, "make 16 experts"),
        ({"moe_layer_freq": "[1]*3"}, "has 3 layers"),
        ({"granularity": 128, "expert_tensor_parallel_size": 4}, "ffn_hidden_size / 128=2"),
        ({"moe_router_topk": 1}, "would not learn"),
        ({"granularity": -1}, "granularity is -1; expected 1 or more"),
        ({"expansion_rate": -1}, "expansion_rate is -1; expected 2 or more"),
        ({"expansion_rate": 0, "granularity": 2}, "expansion_rate is 0; expected 1 or more"),
        ({"router_init_std": float("inf")}, "router_init_std is inf"),
        ({"seed": -1}, "seed is -1; expected an integer from 0 to"),
        ({"max_steps": 0}, "max_steps is 0; expected 1 or more"),
        ({"max_steps": -1}, "max_steps is -1; expected 1 or more"),
        ({"global_batch_size": 0}, "global_batch_size is 0; expected 1 or more"),
        ({"name": ""}, "name is '', empty"),
        ({"name": "runs/"}, "name is 'runs/', empty, or with an empty part"),
        ({"name": "../run"}, "name is '../run', which leads elsewhere"),
        ({"name": "/tmp/run"}, "name is '/tmp/run', an absolute path"),
        ({"name": "~/run"}, "name is '~/run', which looks like a home directory"),
        ({"name": "run{step}"}, "name is 'run{step}', with { }"),
        ({"name": "run\n"}, "with characters that cannot be printed"),
        ({"name": "r" * 121}, ", of more than 120 bytes"),
        ({"name": "data"}, "demo/data/documentation lies in the run's own directory demo/data"),
        (
            {"name": "bpe", "tokenizer": "demo/bpe"},
            "demo/bpe lies in the run's own directory demo/bpe",
        ),
    ],
)
def test_bad_choices_are_refused_by_the_factory(values: dict, message: str) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    with pytest.raises(UpcyclingError, match=message):
        upcycled_recipe(**values)


def test_a_choice_that_costs_something_is_a_warning() -> None:
    import warnings

    from nemo_upcycle_recipes.factory import UpcyclingWarning
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    with pytest.warns(UpcyclingWarning, match="75% of the assignments"):
        upcycled_recipe(moe_expert_capacity_factor=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UpcyclingWarning)
        upcycled_recipe()
        upcycled_recipe(from_scratch=True, moe_expert_capacity_factor=1.0)


def test_the_scratch_control_has_the_same_model_and_no_upcycling(dense: Path) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    upcycled = upcycled_recipe(dense_checkpoint=str(dense))
    scratch = upcycled_recipe(dense_checkpoint=str(dense), from_scratch=True)
    assert scratch.model == upcycled.model
    assert scratch.data == upcycled.data
    assert scratch.trainer.callbacks[:-1] == upcycled.trainer.callbacks[:-1]
    assert scratch.trainer.callbacks[-1].__fn_or_cls__.__name__ == "Provenance"


def test_the_dense_control_has_the_same_data_and_schedule() -> None:
    from nemo_upcycle_recipes.upcycled import FACTORIES

    assert LLAMA3_8B_DENSE.schedule == LLAMA3_8B_E8T2.schedule
    dense, moe = (FACTORIES[name]() for name in ("llama3_8b_dense", "llama3_8b_e8t2"))
    assert dense.data == moe.data
    assert dense.optim == moe.optim
    assert dense.trainer.max_steps == moe.trainer.max_steps
    assert dense.trainer.callbacks[-1].dense_checkpoint == "meta-llama/Meta-Llama-3-8B"


@pytest.mark.parametrize(
    "storage",
    [
        {"optimizer_state": "bf16"},
        {"optimizer_offload_fraction": 0.5},
        {"grad_reduce_in_fp32": False},
    ],
)
def test_savings_in_the_optimizer_are_refused_on_cpu(storage: dict[str, Any]) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    with pytest.raises(UpcyclingError, match=r"needs a GPU and Transformer Engine\. On CPU leave"):
        upcycled_recipe(accelerator="cpu", precision="bf16-mixed", **storage)


def test_fp8_is_refused_on_cpu() -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    with pytest.raises(UpcyclingError, match="needs a GPU and Transformer Engine; on CPU use '32'"):
        upcycled_recipe(accelerator="cpu", precision="fp8")


def test_recompute_on_cpu() -> None:
    """Megatron recomputes the activation function of grouped experts alone, which need a GPU."""
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

    config = upcycled_recipe(accelerator="cpu", recompute="moe").model.config
    assert config.recompute_modules == ["moe"]
    for name in ("moe_act", "norm_act"):
        with pytest.raises(UpcyclingError, match=f"{name}', which needs grouped GEMM"):
            upcycled_recipe(accelerator="cpu", recompute=name)
