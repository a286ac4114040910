"""What the hook makes does not depend on how the model is spread, and computes the dense model."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.initializers import initialize_router
from tests.calibrations import write_statistics
from tests.distributed.foldings import FOLDINGS, NAMES, ONE_RANK
from tests.distributed.pool import RankPool
from tests.distributed.whole import differing, whole
from tests.megatron import scenarios
from tests.megatron.grid import IDS, WAYS, Grid, ways
from tests.stacks import DIGESTS, digest, write_by_numbers

TOLERANCE = 1e-5
FOLDED = ParallelFolding.of(tp=2, pp=2, ep=2)


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


def test_statistics_give_the_rows_of_the_nemo_front(ranks: RankPool, tmp_path: Path) -> None:
    """`tests/distributed/test_statistics.py` compares the rows of a NeMo recipe likewise."""
    dense = write_by_numbers(tmp_path / "dense")
    file = write_statistics(tmp_path / "statistics", dense)
    upcycling = scenarios.replace(
        scenarios.UPCYCLING,
        initializer=f"cluster_svd(stats={str(file)!r})",
        router_initializer=f"centroids(stats={str(file)!r})",
    )
    given = {"dense": str(dense), "upcycling": upcycling}
    found = [
        whole(
            shard
            for shards in ranks.run(scenarios.weights, size, folding=folding, **given)
            for shard in shards
        )
        for size, folding in ((1, ParallelFolding()), (4, FOLDED))
    ]
    assert differing(*found) == []
    for layer in range(4):
        rows = found[0][f"decoder.layers.{layer}.mlp.router.weight"].numpy()
        expected = initialize_router(upcycling, layer, (0, 8), rows.shape[1])
        assert rows.any() and (rows == expected).all()
    arguments = {"dense": dense, "folding": ParallelFolding(), "upcycling": upcycling}
    write_statistics(file, dense, fingerprint="of another")
    (error,) = ranks.run(scenarios.error_of, 1, **arguments, arguments={})
    assert "is of another dense checkpoint" in error


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
