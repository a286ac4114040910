"""Health metrics are the same however the model is spread, and what is wrong shows at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.engine.load_record import LOADS, read_loads
from nemo_upcycle.errors import UpcyclingError
from tests.distributed.pool import RankPool, nemo_recipe
from tests.thorough import thorough
from tests.workspace import make_workspace

STEPS = 3
FOLDINGS = {
    "TP2-PP2-EP2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
    ),
    "CP2-EP2": (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}),
    "DP2": (2, {}),
    "ETP2": (2, {"expert_tensor_parallel_size": 2}),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"moe_z_loss_coeff": 1e-3},
    "granular, partly dense": {
        "granularity": 2,
        "moe_router_topk": 4,
        "moe_layer_freq": (0, 1, 1, 1),
    },
    "sigmoid, expert bias, part shared": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-2,
        "moe_shared_expert_intermediate_size": 0.25,
    },
}


@nemo_recipe
def health(
    directory: Path, options: dict[str, Any], damage: str | None = None, lr: float = 1e-3
) -> list[dict[str, float]] | str:
    """Train some steps; return what is logged at each, or the error."""
    import fiddle
    import lightning.pytorch as pl
    from megatron.core.transformer.moe.router import TopKRouter
    from nemo.lightning import io
    from nemo_upcycle_recipes import llama_tiny

    from nemo_upcycle.nemo.moe_health import MoEHealthCallback

    class Damage(pl.Callback, io.IOMixin):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            for chunk in trainer.strategy.megatron_parallel:
                for router in chunk.modules():
                    if isinstance(router, TopKRouter):
                        _damage(router, damage)

    recipe = llama_tiny.upcycled_recipe(dir=str(directory), max_steps=STEPS, **options)
    recipe.log.ckpt = None
    recipe.trainer.limit_val_batches = 0
    recipe.optim.config.lr = recipe.optim.config.min_lr = lr
    recipe.optim.lr_scheduler.min_lr = lr
    run = fiddle.build(recipe)
    callback = MoEHealthCallback(every_n_steps=1)
    seen = []
    measure = callback.measure

    def keep() -> Any:
        seen.append(measure())
        return seen[-1]

    callback.measure = keep  # type: ignore[method-assign]
    callbacks = run.keywords["trainer"].callbacks
    callbacks[:] = [each for each in callbacks if not isinstance(each, MoEHealthCallback)]
    callbacks += [Damage(), callback]
    try:
        run()
    except UpcyclingError as error:
        return f"{type(error).__name__}: {error}"
    return [each.scalars() for each in seen]


def _damage(router: Any, damage: str | None) -> None:
    biases = {"one expert": (0, 20.0), "dead": (5, -20.0)}
    if damage in biases:
        expert, bias = biases[damage]
        gating = router.gating
        router.gating = lambda x: gating(x) + bias * (torch.arange(8) == expert)
    elif damage == "NaN" and router.layer_number == 2:
        router.weight.data.fill_(float("nan"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def one(ranks: RankPool, workspace: Path, name: str, **options: Any) -> Any:
    damage = options.pop("damage", None)
    (found,) = ranks.run(
        health, 1, directory=workspace, options={"name": name, **options}, damage=damage
    )
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        thorough("sigmoid, expert bias, part shared"),
        pytest.param("granular, partly dense", marks=pytest.mark.slow),
    ],
)
def test_any_mapping_says_the_same(ranks: RankPool, workspace: Path, kind: str) -> None:
    expected = one(ranks, workspace, f"{kind}-1", **KINDS[kind])
    assert len(expected) == STEPS
    names = {name for name in expected[-1] if "layer" not in name}
    common = {"expert_load_cv", "dead_experts", "dropped_tokens", "router_entropy"}
    common |= {"router_confidence", "expert_distance", "router_distance", "load_balancing_loss"}
    assert {f"moe/{name}" for name in common} <= names
    assert ("moe/z_loss" in names) == ("moe_z_loss_coeff" in KINDS[kind])
    is_biased = "moe_router_enable_expert_bias" in KINDS[kind]
    assert ("moe/expert_bias_range" in names) == is_biased
    if is_biased:  # at first the same step up or down for every expert
        assert expected[0]["moe/expert_bias_range"] == pytest.approx(2e-2)
    distances = [each["moe/expert_distance"] for each in expected]
    assert 0 < distances[0] < distances[-1] < 1
    assert distances[0] < 1e-3  # copies, one step later
    assert 0 < expected[-1]["moe/router_distance"] < 1
    for name, (world_size, folding) in FOLDINGS.items():
        if kind != "plain" and name == "ETP2":
            continue
        options = {"name": f"{kind}-{name}", **KINDS[kind], **folding}
        for found in ranks.run(health, world_size, directory=workspace, options=options):
            assert isinstance(found, list), found
            for step, (one_rank, several) in enumerate(zip(expected, found, strict=True)):
                assert several.keys() == one_rank.keys()
                for metric, value in one_rank.items():
                    bound = pytest.approx(value, rel=0.02, abs=2e-3)
                    assert several[metric] == bound, (name, step, metric)


@pytest.mark.thorough
def test_all_tokens_to_one_expert(ranks: RankPool, workspace: Path) -> None:
    found = one(ranks, workspace, "one", damage="one expert")
    usual = one(ranks, workspace, "usual")
    assert found[0]["moe/router_confidence"] == pytest.approx(1, abs=1e-4)
    assert found[0]["moe/router_entropy"] == pytest.approx(0, abs=1e-4)
    assert found[0]["moe/expert_load_cv"] > usual[0]["moe/expert_load_cv"] + 0.5


def test_a_dead_expert(ranks: RankPool, workspace: Path) -> None:
    found = one(ranks, workspace, "dead", damage="dead")
    assert found[0]["moe/dead_experts"] == 4  # one in each of four layers
    assert found[0]["moe/dead_experts_layer_2"] == 1


@pytest.mark.thorough
def test_dropped_tokens(ranks: RankPool, workspace: Path) -> None:
    options = {"moe_expert_capacity_factor": 1.0}
    full = one(ranks, workspace, "capacity", damage="one expert", **options)
    assert 0.3 < full[0]["moe/dropped_tokens"] < 0.7
    assert one(ranks, workspace, "dropless")[0]["moe/dropped_tokens"] == 0


def test_a_router_of_nan_ends_the_run(ranks: RankPool, workspace: Path) -> None:
    said = one(ranks, workspace, "nan", damage="NaN")
    assert isinstance(said, str)
    assert said.startswith("UpcyclingError: The router of layer 1 computes NaN or Inf")


def test_loads_and_picture_of_a_run(ranks: RankPool, workspace: Path) -> None:
    one(ranks, workspace, "picture")
    assert (workspace / "picture" / "moe_load.png").stat().st_size > 10_000
    loads = read_loads(workspace / "picture" / LOADS)
    assert [each.step for each in loads] == [1, 2, 3]
    for each in loads:
        assert [len(shares or ()) for shares in each.layers] == [8] * 4
        assert all(sum(shares or ()) == pytest.approx(1, abs=1e-3) for shares in each.layers)


def test_the_record_of_loads_names_dense_layers(ranks: RankPool, workspace: Path) -> None:
    one(ranks, workspace, "mixed", moe_layer_freq=(0, 1, 0, 1))
    for each in read_loads(workspace / "mixed" / LOADS):
        assert list(each.relative) == [1, 3]
