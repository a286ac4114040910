"""What the hook makes does not depend on how the model is spread, and computes the dense model."""

import pytest
import torch

from nemo_upcycle.config import ParallelFolding
from tests.distributed.foldings import FOLDINGS, NAMES, ONE_RANK
from tests.distributed.pool import RankPool
from tests.distributed.whole import differing, whole
from tests.megatron import scenarios
from tests.megatron.grid import IDS, WAYS, Grid, ways
from tests.stacks import DIGESTS, digest, write_by_numbers

TOLERANCE = 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bit_identical_on_any_mapping(megatron_grid: Grid, name: str, way: str) -> None:
    weights = megatron_grid.run(name).weights[way]
    expected = megatron_grid.one_rank(name).weights["copy" if way == "read once" else way]
    assert not weights.problems
    assert differing(weights.parameters, expected.parameters) == []


@pytest.mark.parametrize("way", DIGESTS)
def test_weights_are_those_of_the_nemo_front(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, way: str
) -> None:
    dense = write_by_numbers(tmp_path_factory.mktemp("numbers") / "dense")
    branch = write_by_numbers(dense.with_name("branch"), salt=1)
    chosen = ways(dense, branch)[way]
    upcycling = scenarios.replace(scenarios.UPCYCLING, initializer=chosen.initializer)
    shards = ranks.run(
        scenarios.weights,
        1,
        dense=chosen.source,
        folding=ParallelFolding(),
        upcycling=upcycling,
    )
    assert digest(whole(shards[0])) == DIGESTS[way]


@pytest.mark.parametrize("name", [*ONE_RANK, *NAMES])
def test_logits_are_those_of_transformers(megatron_grid: Grid, name: str) -> None:
    from transformers import AutoModelForCausalLM

    dense = megatron_grid.dense((ONE_RANK | FOLDINGS)[name].dense)
    ids = IDS[:, :-1]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
    seen = torch.zeros(ids.shape[1], dtype=torch.bool)
    for positions, logits in megatron_grid.run(name).logits:
        seen[positions] = True
        assert (logits - expected[:, positions]).abs().max() <= TOLERANCE
    assert seen.all()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_same_on_any_mapping(megatron_grid: Grid, name: str) -> None:
    found, expected = megatron_grid.run(name), megatron_grid.one_rank(name)
    mapping = FOLDINGS[name]
    copies = mapping.folding.tensor_model_parallel_size * mapping.folding.data_parallel_size(
        mapping.world_size
    )
    assert sum(found.losses) / copies == pytest.approx(expected.losses[0], rel=TOLERANCE)
    assert not found.gradients.problems
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=TOLERANCE)
    for norm in found.clip_norms:
        assert norm == pytest.approx(expected.grad_norm, rel=TOLERANCE)
