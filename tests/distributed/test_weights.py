"""What fills the model does not depend on how it is spread."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.tiny import write_llama

FOLDINGS = {
    "DP2": (2, ParallelFolding()),
    "EP2": (2, ParallelFolding(expert_model_parallel_size=2)),
    "TP2-ETP1": (2, ParallelFolding(tensor_model_parallel_size=2)),
    "TP2-EP2-ETP1": (
        2,
        ParallelFolding(tensor_model_parallel_size=2, expert_model_parallel_size=2),
    ),
    "TP1-ETP2": (2, ParallelFolding(expert_tensor_parallel_size=2)),
    "TP2-ETP2": (
        2,
        ParallelFolding(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
    ),
    "TP4-EP2-ETP2": (
        4,
        ParallelFolding(
            tensor_model_parallel_size=4,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=2,
        ),
    ),
    "TP2-PP2-EP2-ETP1": (
        4,
        ParallelFolding(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            expert_model_parallel_size=2,
        ),
    ),
    "PP2-VPP2-EP2": (
        4,
        ParallelFolding(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            expert_model_parallel_size=2,
        ),
    ),
    "PP4": (4, ParallelFolding(pipeline_model_parallel_size=4)),
}


def place_of(shard: Any) -> tuple[slice, ...]:
    """Return where a shard lies in the whole parameter."""
    return tuple(
        slice(start, start + size) for start, size in zip(shard.offset, shard.shape, strict=True)
    )


def whole(shards: list[tuple[Any, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put shards together; every element must be there, and the same wherever it is twice."""
    parameters: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for shard, values in shards:
        if shard.name not in parameters:
            parameters[shard.name] = torch.full(shard.global_shape, float("nan"))
            filled[shard.name] = torch.zeros(shard.global_shape, dtype=torch.bool)
        place = place_of(shard)
        seen = filled[shard.name][place]
        assert torch.equal(parameters[shard.name][place][seen], values[seen]), shard.name
        parameters[shard.name][place] = values
        filled[shard.name][place] = True
    missing = [name for name, mask in filled.items() if not mask.all()]
    assert not missing
    return parameters


def upcycled(
    ranks: RankPool, dense: Path, folding: tuple[int, ParallelFolding], **config: Any
) -> dict[str, torch.Tensor]:
    world_size, spread = folding
    results = ranks.run(
        scenarios.weights,
        world_size,
        dense=dense,
        folding=spread,
        upcycling=UpcyclingConfig(**config),
    )
    return whole([shard for result in results for shard in result.values()])


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, dense: Path) -> dict[str, torch.Tensor]:
    return upcycled(ranks, dense, (1, ParallelFolding()))


@pytest.mark.parametrize("name", FOLDINGS)
def test_weights_are_bit_identical_on_any_folding(
    ranks: RankPool, dense: Path, one_rank: dict[str, torch.Tensor], name: str
) -> None:
    spread = upcycled(ranks, dense, FOLDINGS[name])
    assert spread.keys() == one_rank.keys()
    different = [key for key, value in spread.items() if not torch.equal(value, one_rank[key])]
    assert not different


def test_experts_are_the_dense_layer(dense: Path, one_rank: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(dense / "model.safetensors")
    for layer in range(4):
        mlp = f"model.layers.{layer}.mlp."
        fc1 = torch.cat([tensors[mlp + "gate_proj.weight"], tensors[mlp + "up_proj.weight"]])
        for expert in range(8):
            prefix = f"decoder.layers.{layer}.mlp.experts.{expert}."
            assert torch.equal(one_rank[prefix + "linear_fc1.weight"], fc1)
            assert torch.equal(
                one_rank[prefix + "linear_fc2.weight"], tensors[mlp + "down_proj.weight"]
            )


def test_router_is_random_with_the_std_and_seed_asked_for(
    ranks: RankPool, dense: Path, one_rank: dict[str, torch.Tensor]
) -> None:
    routers = [value for key, value in one_rank.items() if key.endswith("router.weight")]
    values = torch.stack(routers)
    assert values.shape == (4, 8, 64)
    # 2048 draws: the sample's standard deviation is within 1.6% of the true one (1 sigma).
    assert abs(float(values.std()) / 0.02 - 1) < 0.08
    assert abs(float(values.mean())) < 4 * 0.02 / 2048**0.5
    assert len({tuple(row.tolist()) for row in values.reshape(-1, 64)}) == 32
    other = upcycled(ranks, dense, (1, ParallelFolding()), seed=99)
    wide = upcycled(ranks, dense, (1, ParallelFolding()), router_init_std=0.04)
    key = "decoder.layers.0.mlp.router.weight"
    assert not torch.equal(other[key], one_rank[key])
    assert torch.allclose(wide[key], 2 * one_rank[key])


def test_padded_vocabulary_is_zero(ranks: RankPool, tmp_path: Path) -> None:
    dense = write_llama(tmp_path, vocab_size=255)
    folding = ParallelFolding(tensor_model_parallel_size=2)
    parameters = upcycled(ranks, dense, (2, folding))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert parameters[name].shape[0] == 256
        assert not parameters[name][255].any()
        assert parameters[name][254].any()


def test_random_experts_differ(ranks: RankPool, dense: Path) -> None:
    """The from-scratch control: no two experts start alike, on whatever ranks they are."""
    by_expert: dict[int, list[torch.Tensor]] = defaultdict(list)
    for result in ranks.run(
        scenarios.random_experts,
        2,
        dense=dense,
        folding=ParallelFolding(expert_model_parallel_size=2),
        upcycling=UpcyclingConfig(),
    ):
        for name, values in result.items():
            if "layers.0." in name and "linear_fc2" in name:
                by_expert[int(name.split(".experts.")[1].split(".")[0])].append(values)
    assert sorted(by_expert) == list(range(8))
    experts = [values[0] for _, values in sorted(by_expert.items())]
    for i in range(8):
        for j in range(i):
            assert not torch.equal(experts[i], experts[j]), (i, j)
