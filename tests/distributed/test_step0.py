"""At step 0 the upcycled Megatron model computes what the dense Hugging Face model computes."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
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


def dense_logits(dense: Path) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(dense)(IDS).logits


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
    found = [output for output in outputs if output is not None]
    assert found
    expected = dense_logits(dense)
    return max(float((output - expected).abs().max()) for output in found)


@pytest.mark.parametrize(
    ("world_size", "folding"),
    [
        pytest.param(1, ParallelFolding(), id="1"),
        pytest.param(2, ParallelFolding(expert_model_parallel_size=2), id="EP2"),
        pytest.param(2, ParallelFolding(pipeline_model_parallel_size=2), id="PP2"),
        pytest.param(4, FOLDED, id="TP2-PP2-EP2-ETP1"),
        pytest.param(
            4,
            ParallelFolding(tensor_model_parallel_size=4, expert_model_parallel_size=4),
            id="TP4-EP4-ETP1",
        ),
        pytest.param(
            4,
            ParallelFolding(
                pipeline_model_parallel_size=2,
                virtual_pipeline_model_parallel_size=2,
                expert_model_parallel_size=2,
            ),
            id="PP2-VPP2-EP2",
        ),
    ],
)
def test_logits_equal_dense(
    ranks: RankPool, dense: Path, world_size: int, folding: ParallelFolding
) -> None:
    assert difference(ranks, dense, world_size, folding) <= TOLERANCE


@pytest.mark.parametrize("damage", ["swap gate and up", "zero expert 1"])
@pytest.mark.parametrize(("world_size", "folding"), [(1, ParallelFolding()), (4, FOLDED)])
def test_a_wrong_loader_is_seen(
    ranks: RankPool, dense: Path, world_size: int, folding: ParallelFolding, damage: str
) -> None:
    assert difference(ranks, dense, world_size, folding, damage=damage) > 100 * TOLERANCE


def test_softmax_first_is_not_exact(ranks: RankPool, dense: Path) -> None:
    upcycling = UpcyclingConfig(moe_router_pre_softmax=True)
    assert not upcycling.exactness().exact
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
    assert upcycling.exactness().exact
    folding = ParallelFolding(expert_model_parallel_size=2)
    assert difference(ranks, dense, 2, folding, upcycling) <= TOLERANCE
