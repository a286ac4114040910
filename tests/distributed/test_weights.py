"""What fills the model does not depend on how it is spread."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.foldings import NAMES
from tests.distributed.grid import INITIALIZERS, WAYS, Grid
from tests.distributed.pool import RankPool
from tests.distributed.whole import differing, whole
from tests.tiny import write_llama


def upcycled(
    ranks: RankPool, dense: Path, world_size: int, folding: ParallelFolding, **config: Any
) -> dict[str, torch.Tensor]:
    results = ranks.run(
        scenarios.weights,
        world_size,
        dense=dense,
        folding=folding,
        upcycling=UpcyclingConfig(**config),
    )
    return whole(shard for result in results for shard in result)


@pytest.fixture(scope="module")
def one_rank(grid: Grid) -> dict[str, torch.Tensor]:
    return grid.run("1 rank, 4 layers").weights["huggingface"].parameters


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bit_identical_on_any_folding(grid: Grid, name: str, way: str) -> None:
    weights = grid.run(name).weights[way]
    same_as = "huggingface" if way in ("read once", "megatron") else way
    expected = grid.one_rank(name).weights[same_as].parameters
    assert not weights.problems
    assert differing(weights.parameters, expected) == []


def test_experts_are_the_dense_layer(grid: Grid, one_rank: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(grid.dense("4 layers") / "model.safetensors")
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
    other = upcycled(ranks, dense, 1, ParallelFolding(), seed=99)
    wide = upcycled(ranks, dense, 1, ParallelFolding(), router_init_std=0.04)
    key = "decoder.layers.0.mlp.router.weight"
    assert not torch.equal(other[key], one_rank[key])
    assert torch.allclose(wide[key], 2 * one_rank[key])


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("read once", "megatron")])
def test_each_way_gives_other_weights(grid: Grid, way: str) -> None:
    """Or the test above would show nothing."""
    weights = grid.run("1 rank, 4 layers").weights
    others = [name for name in WAYS if name not in (way, "read once", "megatron")]
    for other in others:
        assert differing(weights[way].parameters, weights[other].parameters), other


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_the_seed_decides(ranks: RankPool, grid: Grid, initializer: str) -> None:
    dense = grid.dense("4 layers")
    folding = ParallelFolding()
    again = upcycled(ranks, dense, 1, folding, initializer=initializer)
    other = upcycled(ranks, dense, 1, folding, initializer=initializer, seed=99)
    first = grid.run("1 rank, 4 layers").weights[initializer].parameters
    assert differing(again, first) == []
    changed = {name for name in differing(other, first) if ".experts." in name}
    expected = {name for name in first if ".experts." in name}
    if initializer.startswith("hybrid"):  # of which every fourth is a copy
        expected = {n for n in expected if int(n.split(".experts.")[1].split(".")[0]) % 4}
    assert changed == expected


def test_padded_vocabulary_is_zero(ranks: RankPool, tmp_path: Path) -> None:
    dense = write_llama(tmp_path, vocab_size=255)
    folding = ParallelFolding(tensor_model_parallel_size=2)
    parameters = upcycled(ranks, dense, 2, folding)
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
