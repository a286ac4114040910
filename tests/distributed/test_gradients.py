"""One step's loss and gradients on several ranks equal one rank's."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.distributed.test_weights import FOLDINGS, place_of
from tests.tiny import tokens

IDS = tokens(rows=4, length=33)


def step(
    ranks: RankPool, dense: Path, world_size: int, folding: ParallelFolding
) -> tuple[float, dict[str, torch.Tensor]]:
    results = ranks.run(
        scenarios.loss_and_gradients,
        world_size,
        dense=dense,
        folding=folding,
        upcycling=UpcyclingConfig(),
        ids=IDS,
    )
    last_stages = [losses for losses, _ in results if losses]
    mean = sum(map(sum, last_stages)) / sum(map(len, last_stages))
    gradients: dict[str, torch.Tensor] = {}
    for _, shards in results:
        for shard, values in shards:
            whole = gradients.setdefault(shard.name, torch.zeros(shard.global_shape))
            whole[place_of(shard)] = values
    return mean, gradients


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, dense: Path) -> tuple[float, dict[str, torch.Tensor]]:
    return step(ranks, dense, 1, ParallelFolding())


@pytest.mark.parametrize("name", FOLDINGS)
def test_step_equals_one_rank(
    ranks: RankPool, dense: Path, one_rank: tuple[float, dict[str, torch.Tensor]], name: str
) -> None:
    loss, gradients = step(ranks, dense, *FOLDINGS[name])
    expected_loss, expected = one_rank
    assert abs(loss - expected_loss) < 1e-5
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        scale = float(expected[key].abs().max())
        assert scale > 0, key
        error = float((gradient - expected[key]).abs().max()) / scale
        assert error < 1e-4, (key, error)
