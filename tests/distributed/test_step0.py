"""At step 0 the upcycled Megatron model computes what the dense Hugging Face model computes."""

from pathlib import Path

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import grid as grids
from tests.distributed.foldings import FOLDINGS, NAMES, ONE_RANK
from tests.distributed.grid import Grid
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, TOLERANCE, difference, error
from tests.tiny import LLAMA31_ROPE, write_llama


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
