"""What the hook refuses, what it needs, and that a broken one is seen."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.megatron import upcycle
from nemo_upcycle.megatron.model import described
from tests.distributed.foldings import FOLDINGS
from tests.distributed.pool import RankError, RankPool
from tests.distributed.whole import differing, whole
from tests.megatron import scenarios
from tests.megatron.grid import IDS, Grid
from tests.megatron.scenarios import UPCYCLING
from tests.tiny import FAMILIES, LLAMA31_ROPE, tokens, write_dense, write_llama

TOLERANCE = 1e-5
ONE = ParallelFolding()
ROWS = tokens(rows=2, length=48)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "Llama 3.1's RoPE": (
        "llama",
        {
            "max_position_embeddings": 16384,
            "rope_scaling": {
                **LLAMA31_ROPE,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "other RoPE scaling": ("llama", {"rope_scaling": LLAMA31_ROPE}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "head size": ("llama", {"head_dim": 16}),
}


def error(found: list[scenarios.Logits | None], dense: Path, ids: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
    shown = [each for each in found if each is not None]
    assert shown
    return max(float((logits - expected[:, at]).abs().max()) for at, logits in shown)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_family_is_computed(
    ranks: RankPool, tmp_path: Path, name: str, world_size: int
) -> None:
    family, config = VARIANTS[name]
    dense = write_dense(tmp_path, family, **config)
    folding = ParallelFolding.of(tp=world_size)
    given = {"dense": dense, "folding": folding, "upcycling": UPCYCLING, "ids": ROWS}
    found = ranks.run(scenarios.upcycled_logits, world_size, seq_length=64, **given)
    assert error(found, dense, ROWS) <= TOLERANCE


CHOICES = {
    "dense, as it is": UpcyclingConfig(num_moe_experts=None),
    "some layers": UpcyclingConfig(moe_layer_freq=(0, 1, 1, 0)),
    "shared expert": UpcyclingConfig(moe_shared_expert=True),
    "granular": UpcyclingConfig(num_moe_experts=8, granularity=2, moe_router_topk=4),
    "capacity": UpcyclingConfig(moe_expert_capacity_factor=8.0),
    "sigmoid, expert bias, normalized logits, part shared": UpcyclingConfig(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        router_logit_normalization=2.0,
        moe_shared_expert_intermediate_size=0.5,
    ),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("sizes", [{}, {"pp": 2, "vpp": 2}])
def test_every_choice_is_computed(
    ranks: RankPool, grid_dense: Path, name: str, sizes: dict[str, int]
) -> None:
    given = {"dense": grid_dense, "upcycling": CHOICES[name], "ids": ROWS}
    folding = ParallelFolding.of(**sizes)
    found = ranks.run(scenarios.upcycled_logits, 2 if sizes else 1, folding=folding, **given)
    assert error(found, grid_dense, ROWS) <= TOLERANCE


@pytest.mark.parametrize("breakage", ["other_order", "first_stage_alone"])
def test_a_broken_hook_is_seen(ranks: RankPool, grid_dense: Path, breakage: str) -> None:
    mapping = FOLDINGS["PP2-VPP2"]
    given = {"dense": grid_dense, "folding": mapping.folding, "upcycling": UPCYCLING, "ids": ROWS}
    found = ranks.run(scenarios.upcycled_logits, 2, **given)
    assert error(found, grid_dense, ROWS) <= TOLERANCE
    with pytest.raises(RankError):
        ranks.run(scenarios.upcycled_logits, 2, breakage=breakage, **given)


@pytest.fixture(scope="module")
def grid_dense(megatron_grid: Grid) -> Path:
    return megatron_grid.dense("4 layers")


@pytest.mark.parametrize("sizes", [{"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}])
def test_the_norm_counts_experts_of_all_ranks(
    ranks: RankPool, grid_dense: Path, sizes: dict[str, int]
) -> None:
    """Also where Transformer Engine has not marked them (NVIDIA/Megatron-LM#5916)."""
    (expected,) = ranks.run(scenarios.norm_of_step, 1, dense=grid_dense, folding=ONE, ids=IDS)
    given = {"dense": grid_dense, "folding": ParallelFolding.of(**sizes), "ids": IDS}
    for norm in ranks.run(scenarios.norm_of_step, 2, unmark_before=True, **given):
        assert norm == pytest.approx(expected, rel=TOLERANCE)
    if "etp" in sizes:  # with ETP 1 this version of Megatron-Core needs no mark
        for norm in ranks.run(scenarios.norm_of_step, 2, unmark_after=True, **given):
            assert norm < (1 - 1000 * TOLERANCE) * expected


@pytest.mark.parametrize("other", [None, ParallelFolding(), ParallelFolding.of(pp=2)])
def test_the_builders_process_groups_are_enough(
    ranks: RankPool, megatron_grid: Grid, other: ParallelFolding | None
) -> None:
    dense = megatron_grid.dense("4 layers")
    mapping = FOLDINGS["TP2-EP2-ETP1"]
    found = ranks.run(
        scenarios.without_global_groups,
        2,
        dense=dense,
        folding=mapping.folding,
        upcycling=UPCYCLING,
        other=other,
    )
    expected = megatron_grid.run("1 rank, 4 layers").weights["copy"].parameters
    assert differing(whole(shard for rank in found for shard in rank), expected) == []


def test_padding_is_zero_and_no_token(ranks: RankPool, tmp_path: Path) -> None:
    dense = write_llama(tmp_path, vocab_size=255)
    folding = ParallelFolding.of(tp=2)
    ids = tokens(rows=4, length=33, vocab_size=255)
    found = ranks.run(scenarios.weights, 2, dense=str(dense), folding=folding, upcycling=UPCYCLING)
    parameters = whole(shard for rank in found for shard in rank)
    assert parameters["output_layer.weight"].shape[0] == 256
    assert not parameters["output_layer.weight"][255].any()
    (expected,) = ranks.run(scenarios.norm_of_step, 1, dense=dense, folding=ONE, ids=ids)
    for norm in ranks.run(scenarios.norm_of_step, 2, dense=dense, folding=folding, ids=ids):
        assert norm == pytest.approx(expected, rel=TOLERANCE)


def told(
    ranks: RankPool,
    dense: Path,
    arguments: dict[str, Any] | None = None,
    world_size: int = 1,
    **others: Any,
) -> str:
    """Return what the hook's error says, on every rank."""
    said = ranks.run(
        scenarios.error_of,
        world_size,
        dense=dense,
        folding=ONE,
        upcycling=UPCYCLING,
        arguments=arguments or {},
        **others,
    )
    assert len(set(said)) == 1
    return said[0]


def test_a_missing_checkpoint_is_said(ranks: RankPool, dense: Path, tmp_path: Path) -> None:
    assert "missing" in told(ranks, tmp_path / "missing", model_of=dense, world_size=2)


def test_another_model_is_refused(ranks: RankPool, dense: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path, rope_theta=5000.0)
    said = told(ranks, dense, model_of=other)
    assert "rotary_base is 5000.0, expected 10000.0" in said
    assert "gpt_model_config, or set these fields of the GPTModelConfig" in said
    assert "recipe" not in said


def test_another_scaling_of_rope_is_refused(ranks: RankPool, dense: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path, rope_scaling=LLAMA31_ROPE)
    assert "RoPE is scaled otherwise" in told(ranks, dense, model_of=other)


def test_other_experts_are_refused(ranks: RankPool, dense: Path) -> None:
    asked = UpcyclingConfig(num_moe_experts=4, moe_aux_loss_coeff=0.0)
    assert "num_moe_experts is 8, asked for 4" in told(ranks, dense, asked=asked)


def test_a_hybrid_model_is_refused() -> None:
    with pytest.raises(UpcyclingError, match=r"is a HybridModel, .* expected a GPTModel"):
        described([SimpleNamespace(hybrid_layer_pattern="*E*E")], 128)


def test_parameters_without_memory_are_refused(ranks: RankPool, dense: Path) -> None:
    assert "init_model_with_meta_device" in told(ranks, dense, init_model_with_meta_device=True)


def test_a_run_that_cannot_be_written_is_said(ranks: RankPool, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = told(ranks, dense, {"resume_from": tmp_path / "file" / "run"}, world_size=2)
    assert "cannot be written to" in said


def test_a_place_that_is_no_directory_is_refused(dense: Path) -> None:
    with pytest.raises(UpcyclingError, match="expected a directory of a file system"):
        upcycle(str(dense), resume_from="s3://bucket/run")
