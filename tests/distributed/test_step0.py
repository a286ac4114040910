"""At step 0 the upcycled Megatron model computes what the dense Hugging Face model computes."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import grid as grids
from tests.distributed import scenarios
from tests.distributed.foldings import FOLDINGS, NAMES, ONE_RANK
from tests.distributed.grid import Grid
from tests.distributed.pool import RankPool
from tests.tiny import LLAMA31_ROPE, tokens, write_llama

TOLERANCE = 1e-5
IDS = tokens(rows=2, length=48)

FOLDED = ParallelFolding(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=1,
)


def dense_logits(dense: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits


def error(outputs: list[scenarios.Logits | None], dense: Path, ids: torch.Tensor) -> float:
    """Return how far ranks are at most from the dense model, and check that none leaves a gap."""
    expected = dense_logits(dense, ids)
    seen = torch.zeros(ids.shape[1], dtype=torch.bool)
    largest = 0.0
    for positions, logits in filter(None, outputs):
        seen[positions] = True
        largest = max(largest, float((logits - expected[:, positions]).abs().max()))
    assert seen.all()
    return largest


def difference(
    ranks: RankPool,
    dense: Path,
    world_size: int,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig | None = None,
    damage: str | None = None,
) -> float:
    outputs = ranks.run(
        scenarios.step0_logits,
        world_size,
        dense=dense,
        folding=folding,
        upcycling=upcycling or UpcyclingConfig(),
        ids=IDS,
        damage=damage,
    )
    return error(outputs, dense, IDS)


@pytest.mark.parametrize("name", [*ONE_RANK, *NAMES])
def test_logits_equal_dense(grid: Grid, name: str) -> None:
    dense = grid.dense((ONE_RANK | FOLDINGS)[name].dense)
    assert error(grid.run(name).logits, dense, grids.IDS[:, :-1]) <= TOLERANCE


@pytest.mark.parametrize("damage", ["swap gate and up", "zero expert 1"])
@pytest.mark.parametrize(("world_size", "folding"), [(1, ParallelFolding()), (4, FOLDED)])
def test_a_wrong_loader_is_seen(
    ranks: RankPool, dense: Path, world_size: int, folding: ParallelFolding, damage: str
) -> None:
    assert difference(ranks, dense, world_size, folding, damage=damage) > 100 * TOLERANCE


def test_softmax_first_is_not_exact(ranks: RankPool, dense: Path) -> None:
    upcycling = UpcyclingConfig(moe_router_pre_softmax=True)
    assert not upcycling.exactness(gated=True, dense_checkpoints=1).exact
    assert difference(ranks, dense, 1, ParallelFolding(), upcycling) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"rope_scaling": LLAMA31_ROPE}, id="llama31-rope"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"head_dim": 16}, id="head-dim"),
        pytest.param({"num_key_value_heads": 8}, id="no-gqa"),
    ],
)
@pytest.mark.parametrize(("world_size", "folding"), [(1, ParallelFolding()), (4, FOLDED)])
def test_dense_variants(
    ranks: RankPool, tmp_path: Path, config: dict, world_size: int, folding: ParallelFolding
) -> None:
    dense = write_llama(tmp_path, **config)
    assert difference(ranks, dense, world_size, folding) <= TOLERANCE


def test_many_files(ranks: RankPool, dense: Path, tmp_path: Path) -> None:
    sharded = write_llama(tmp_path, shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert difference(ranks, sharded, 4, FOLDED) <= TOLERANCE


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_capacity_four_drops_nothing(ranks: RankPool, dense: Path, dispatcher: str) -> None:
    upcycling = UpcyclingConfig(moe_expert_capacity_factor=4.0)
    assert upcycling.exactness(gated=True, dense_checkpoints=1).exact
    folding = ParallelFolding(expert_model_parallel_size=2)
    assert difference(ranks, dense, 2, folding, upcycling) <= TOLERANCE
