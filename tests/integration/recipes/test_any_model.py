"""The recipe `upcycle`: published models on 8, 64 and 512 H100, and a trial on CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.checkpoint.described import open_dense
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.fields import upcycling_in
from nemo_upcycle.plans.job import plan_job
from tests.integration.recipes.built import callbacks, megatrons_config
from tests.moe_models import write_moe
from tests.tiny import write_llama

CONFIGS = Path(__file__).parent / "configs"
"""The config.json of models as published, by name."""

MODELS = ("llama31_8b", "qwen25_7b", "qwen3_8b")


def built(directory: Path, **arguments: Any) -> Any:
    from nemo_upcycle_recipes.any_model import upcycle

    return upcycle(dense_checkpoint=str(directory), **arguments)


@pytest.fixture(params=MODELS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = json.loads((CONFIGS / f"{request.param}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def checked(recipe: Any, directory: Path, gpus: int) -> ParallelFolding:
    """Check that Megatron and the plan accept a recipe; return its mapping."""
    config, trainer = megatrons_config(recipe), recipe.trainer
    folding = ParallelFolding(
        **{name: getattr(trainer.strategy, name) for name in vars(ParallelFolding())}
    )
    assert trainer.num_nodes * trainer.devices == gpus
    job = plan_job(
        open_dense(str(directory)),
        upcycling_in(config),
        folding,
        trainer.num_nodes,
        trainer.devices,
    )
    assert job.exactness.exact
    assert (
        recipe.data.global_batch_size
        % (folding.data_parallel_size(gpus) * recipe.data.micro_batch_size)
        == 0
    )
    return folding


@pytest.mark.parametrize("gpus", [64, 512])
def test_mappings_are_those_that_megatron_and_the_plan_accept(published: Path, gpus: int) -> None:
    recipe = built(published, num_nodes=gpus // 8, num_gpus_per_node=8)
    checked(recipe, published, gpus)
    assert recipe.model.config.num_moe_experts == 8
    assert "UpcyclingCallback" in callbacks(recipe)


def test_on_8_gpus_e8_has_its_optimizer_on_the_host(
    published: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = built(published, hardware="h100")
    checked(recipe, published, 8)
    config = recipe.optim.config
    assert (config.optimizer_cpu_offload, config.optimizer_offload_fraction >= 0.75) == (True, True)
    assert "OffloadedOptimizer" in callbacks(recipe)
    said = capsys.readouterr().err
    assert "of the optimizer on the CPUs, which costs" in said
    assert "Without it, this would fit: num_moe_experts=4 on the same GPUs; or 16 GPUs." in said


def test_on_8_gpus_e8_is_refused_with_what_fits_and_that_fits(
    published: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UpcyclingError) as told:
        built(published, hardware="h100", optimizer_offload_fraction=0.0)
    assert "num_moe_experts=4 on the same GPUs; or 16 GPUs." in str(told.value)
    checked(built(published, hardware="h100", num_moe_experts=4), published, 8)
    said = capsys.readouterr().err
    for words in ("E4T2 of ", "the fastest of ", "On 8 H100: ", "learning rate ", "warm-up steps"):
        assert words in said
    assert built(published, hardware="h100", check_memory=False).trainer.devices == 8


def test_the_control_is_the_same_recipe_without_experts(published: Path) -> None:
    moe, control = (
        built(published, hardware="h100", num_nodes=2, **more)
        for more in ({}, {"num_moe_experts": None})
    )
    assert getattr(control.model.config, "num_moe_experts", None) is None
    assert (control.optim, control.trainer.max_steps) == (moe.optim, moe.trainer.max_steps)
    assert control.data.global_batch_size == moe.data.global_batch_size
    assert callbacks(control)[-1] == callbacks(moe)[-1] == "UpcyclingCallback"


def test_what_is_given_is_kept(published: Path) -> None:
    recipe = built(
        published,
        num_nodes=8,
        hardware="h100",
        tensor_model_parallel_size=2,
        micro_batch_size=2,
        recompute="full",
        seq_length=4096,
        global_batch_size=256,
        max_steps=100,
    )
    assert recipe.trainer.strategy.tensor_model_parallel_size == 2
    assert (recipe.data.micro_batch_size, recipe.data.global_batch_size) == (2, 256)
    assert recipe.model.config.recompute_granularity == "full"
    assert recipe.model.config.seq_length == 4096
    assert (recipe.trainer.max_steps, recipe.optim.lr_scheduler.warmup_steps) == (100, 10)


def test_without_a_gpu_it_is_a_trial_on_cpu(tmp_path: Path) -> None:
    recipe = built(write_llama(tmp_path / "dense"), accelerator="cpu")
    assert recipe.trainer.strategy.__fn_or_cls__.__name__ == "CpuMegatronStrategy"
    assert (recipe.data.seq_length, recipe.data.global_batch_size) == (128, 8)
    assert recipe.trainer.plugins.precision == "32"


def test_the_executors_ranks_are_known(tmp_path: Path) -> None:
    import nemo_run as run
    from nemo_upcycle_recipes.executors import launching

    with launching(run.LocalExecutor(ntasks_per_node=4)):
        recipe = built(write_llama(tmp_path / "dense"), accelerator="cpu")
    assert recipe.trainer.strategy.expert_model_parallel_size == 4


def test_the_gpus_of_a_slurm_job_are_known(tmp_path: Path) -> None:
    import nemo_run as run
    from nemo_upcycle_recipes.executors import launching

    job = run.SlurmExecutor(account="a", nodes=2, ntasks_per_node=4, gpus_per_node=4)
    dense = write_llama(tmp_path / "dense")
    with launching(job):
        recipe, other = built(dense), built(dense, num_nodes=3)
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (2, 4)
    assert (other.trainer.num_nodes, other.trainer.devices) == (3, 4)


def test_too_little_memory_is_told_before_anything_starts(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_upcycle_recipes.on_host.available", lambda: 2**34)
    with pytest.raises(UpcyclingError, match=r"GiB more than the 16.0 GiB that are available"):
        built(published, accelerator="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "dense_checkpoint is not given"),
        ({"dense_checkpoint": "/nowhere"}, "No dense checkpoint at '/nowhere'"),
    ],
)
def test_a_dense_checkpoint_is_needed(arguments: dict[str, Any], message: str) -> None:
    from nemo_upcycle_recipes.any_model import upcycle

    with pytest.raises(UpcyclingError, match=message):
        upcycle(**arguments)


def test_an_moe_gives_its_architecture_to_a_run_without_its_weights(tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", "qwen2_moe", moe_intermediate_size=24)
    options = {"accelerator": "cpu", "from_scratch": True, "num_moe_experts": 4, "granularity": 2}
    options["moe_router_pre_softmax"] = True
    recipe = built(moe, moe_shared_expert_intermediate_size=48, **options)
    config = recipe.model.config
    assert (config.num_moe_experts, config.moe_ffn_hidden_size, config.add_qkv_bias) == (
        4,
        24,
        True,
    )
    assert "UpcyclingCallback" not in callbacks(recipe)
    with pytest.raises(UpcyclingError, match="is an MoE already"):
        built(moe, accelerator="cpu")
