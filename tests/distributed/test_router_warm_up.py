"""For the first steps only the routers learn, under any mapping, also when a run is resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine.router_warm_up import check_betas
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.megatron import RouterWarmUp
from tests.distributed import scenarios
from tests.distributed.foldings import FOLDINGS
from tests.distributed.pool import RankPool
from tests.distributed.runs import STOPPED, Runs
from tests.distributed.training import EP2, WITHOUT_LEARNING, train
from tests.distributed.whole import differing, whole
from tests.thorough import thorough_but
from tests.tiny import tokens
from tests.workspace import make_workspace

IDS = tokens(rows=4, length=33)
FROZEN, STEPS = 2, 3
UPCYCLING = UpcyclingConfig(
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="none",
    moe_shared_expert_intermediate_size=0.5,
    router_logit_normalization=1.0,
)


def warmed_up(dense: Path, folding: ParallelFolding) -> tuple[list[Any], int, float]:
    """Train some steps; return this rank's shards before each and after the last.

    Also the number of Adam's moments that are not 0 at the end of the warm-up, less the elements of
    routers' moments; and the weight decay after the last step.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.utils import get_model_config

    from nemo_upcycle.check.models import (
        distributed_optimizer,
        make_experts_differ,
        rows_here,
        shards,
        train_step,
    )

    chunks = scenarios.upcycled(dense, folding, UPCYCLING)
    make_experts_differ(chunks)
    models, _ = distributed_optimizer(chunks)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-3, adam_beta2=0.95, use_distributed_optimizer=True), models
    )
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
    RouterWarmUp(FROZEN).start(models, optimizer)
    seen, excess = [shards(chunks)], 0
    for step in range(STEPS):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        train_step(models, rows_here(IDS))
        optimizer.step()
        seen.append(shards(chunks))
        if step + 1 == FROZEN:
            routers = [s for s, _ in seen[0] if s.name.endswith("router.weight")]
            excess = _moments(optimizer) - 2 * sum(torch.Size(s.shape).numel() for s in routers)
    return seen, excess, max(group["weight_decay"] for group in optimizer.param_groups)


def _moments(optimizer: Any) -> int:
    """Return how many of this rank's moments are not 0."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state for part in parts for state in part.optimizer.state.values()]
    names = ("exp_avg", "exp_avg_sq")
    return sum(int(state[name].count_nonzero()) for state in states for name in names)


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, dense: Path) -> list[dict[str, torch.Tensor]]:
    ((seen, excess, decay),) = ranks.run(warmed_up, 1, dense=dense, folding=FOLDINGS["DP2"].folding)
    assert excess <= 0
    assert decay > 0
    return [whole(each) for each in seen]


def test_only_routers_change(one_rank: list[dict[str, torch.Tensor]]) -> None:
    routers = {name for name in one_rank[0] if ".router." in name}
    assert {name.rpartition(".")[2] for name in routers} == {"weight", "expert_bias"}
    for step in range(FROZEN):
        assert set(differing(one_rank[step], one_rank[step + 1])) == routers
    changed = differing(one_rank[FROZEN], one_rank[FROZEN + 1])
    assert set(changed) == one_rank[0].keys()


@pytest.mark.parametrize(
    "name",
    thorough_but(
        ["TP2-EP2-ETP1", "CP2-EP2", "PP2-VPP2", "EP2-EDP2", "PP2-VPP2-TP2-EP2-ETP1"],
        "PP2-VPP2-TP2-EP2-ETP1",
    ),
)
def test_any_mapping_trains_the_same(
    ranks: RankPool, dense: Path, one_rank: list[dict[str, torch.Tensor]], name: str
) -> None:
    mapping = FOLDINGS[name]
    results = ranks.run(warmed_up, mapping.world_size, dense=dense, folding=mapping.folding)
    assert all(excess <= 0 and decay > 0 for _, excess, decay in results)
    steps = [whole(s for seen, *_ in results for s in seen[step]) for step in range(STEPS + 1)]
    for found, expected in zip(steps, one_rank, strict=True):
        assert found.keys() == expected.keys()
        for parameter, values in expected.items():
            # A bias moves by whole steps. A step of Adam is the learning rate, 1e-3, whatever the
            # gradient's size, so that rounding alone decides on elements without a gradient.
            bound = 0 if parameter.endswith("expert_bias") else 1e-5
            assert float((found[parameter] - values).abs().mean()) <= bound, parameter
    frozen = [name for name in steps[0] if ".router." not in name]
    for step in range(FROZEN):
        assert not set(differing(steps[0], steps[step + 1])) & set(frozen)


# --- In NeMo's recipes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def test_a_recipe_freezes_all_but_routers(ranks: RankPool, workspace: Path) -> None:
    found = []
    for name, options, overrides in (
        ("frozen", {"max_steps": 2, "router_warmup_steps": 2}, {"trainer.limit_val_batches": 0}),
        ("still", {"max_steps": 1}, WITHOUT_LEARNING),
    ):
        results = ranks.run(
            train,
            2,
            directory=workspace,
            options={"name": name, **options, **EP2},
            overrides={**overrides, "log.ckpt": None},
        )
        assert not isinstance(results[0], str), results
        found.append(whole(shard for _, shards in results for shard in shards))
    routers = {name for name in found[0] if ".router.weight" in name}
    assert set(differing(*found)) == routers


@pytest.mark.thorough
def test_a_resumed_run_continues_the_warm_up(runs: Runs, tmp_path: Path) -> None:
    """With the biases of experts, which steps of 0.1 make decide on the routing."""
    biased = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.1,
        "initializer": "drop",
    }
    options = EP2 | biased | {"router_warmup_steps": 3}
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    undisturbed.mkdir()
    stopped.mkdir()
    expected, said = runs.start(undisturbed, options=options)
    assert "[router warm-up] step 3: all parameters are trained from here on" in said
    runs.start(stopped, options=options, accident=("StopAfter", {"step": STOPPED}))
    errors, _ = runs.start(stopped, options=options | {"router_warmup_steps": 4})
    assert "was trained with router_warmup_steps=3; now router_warmup_steps=4" in errors[0]
    losses, _ = runs.start(stopped, options=options)
    assert losses[0] == pytest.approx(expected[0][STOPPED:], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_warmup_steps": -1}, "router_warmup_steps is -1; expected 1 or more"),
        ({"router_warmup_steps": 2, "dense": True}, "which has no routers"),
    ],
)
def test_what_cannot_be_warmed_up_is_refused(options: dict[str, Any], message: str) -> None:
    from nemo_upcycle_recipes import factory

    is_dense = options.pop("dense", False)
    upcycling = UpcyclingConfig(num_moe_experts=None if is_dense else 8)
    with pytest.raises(UpcyclingError, match=message):
        factory.router_warm_up(upcycling, **options)


def test_betas_that_would_jump_are_refused() -> None:
    check_betas(0.9, 0.95)
    check_betas(0.9, 0.98)
    with pytest.raises(UpcyclingError, match=r"up to 6\.6 times too large"):
        check_betas(0.9, 0.999)
