"""What initializers make of a file of statistics, in Megatron's models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.initializers import initialize_router
from tests.calibrations import calibrated, write_statistics, write_texts
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, TOLERANCE, difference
from tests.distributed.training import EP2, WITHOUT_LEARNING, train
from tests.distributed.whole import whole
from tests.workspace import make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


GRANULAR = {"num_moe_experts": 32, "granularity": 4, "moe_router_topk": 8}


@pytest.mark.parametrize("router", ["centroids", "prompts", "ridge"])
def test_copies_are_exact_whatever_the_router(
    ranks: RankPool, dense: Path, tmp_path: Path, router: str
) -> None:
    file = write_statistics(tmp_path / "statistics", dense)
    upcycling = UpcyclingConfig(**GRANULAR, router_initializer=f"{router}(stats={str(file)!r})")
    assert upcycling.exactness(gated=True, dense_checkpoints=1).exact
    assert difference(ranks, dense, 4, FOLDED, upcycling) <= TOLERANCE


def test_a_recipe_takes_statistics(ranks: RankPool, workspace: Path, tmp_path: Path) -> None:
    file = calibrated(
        workspace / "dense_hf",
        write_texts(tmp_path),
        tmp_path / "statistics",
        clusters=8,
        tokenizer=str(workspace / "tokenizer"),
    )
    text = f"centroids(stats={str(file)!r})"
    run = {
        "directory": workspace,
        "options": {"name": "centroids", "max_steps": 1, "router_initializer": text, **EP2},
        "overrides": WITHOUT_LEARNING,
    }
    results = ranks.run(train, 2, **run)
    assert not [result for result in results if isinstance(result, str)]
    parameters = whole([shard for _, shards in results for shard in shards])
    upcycling = UpcyclingConfig(router_initializer=text)
    for layer in range(4):
        found = parameters[f"decoder.layers.{layer}.mlp.router.weight"].numpy()
        expected = initialize_router(upcycling, layer, (0, 8), found.shape[1])
        assert np.array_equal(found, expected) and found.any()
    write_statistics(file, workspace / "dense_hf", fingerprint="of another")
    errors = ranks.run(train, 2, **run)
    assert all("is of another dense checkpoint" in error for error in errors)


def test_a_shared_part_has_the_most_active_neurons(
    ranks: RankPool, dense: Path, tmp_path: Path
) -> None:
    file, part = write_statistics(tmp_path / "statistics", dense), 24
    upcycling = UpcyclingConfig(
        **GRANULAR,
        initializer=f"activation_sorted(stats={str(file)!r})",
        moe_shared_expert_intermediate_size=part,
    )
    assert upcycling.exactness(gated=True, dense_checkpoints=1).exact
    assert difference(ranks, dense, 4, FOLDED, upcycling) <= TOLERANCE
    given = {"dense": dense, "folding": FOLDED, "upcycling": upcycling}
    results = ranks.run(scenarios.weights, 4, **given)
    found = whole(shard for result in results for shard in result)
    statistics, tensors = load_numpy(file), load_file(dense / "model.safetensors")
    for layer in range(4):
        rate, size = (statistics[f"layers.{layer}.neurons.{n}"] for n in ("rate", "magnitude"))
        order = np.lexsort((-size, -rate))[:part]  # stable: ties by number
        gate, up = found[f"decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight"].chunk(2)
        for values, name in ((gate, "gate_proj"), (up, "up_proj")):
            expected = tensors[f"model.layers.{layer}.mlp.{name}.weight"][order.tolist()]
            assert torch.equal(values, expected)
