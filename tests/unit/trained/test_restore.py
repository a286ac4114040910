"""What of a trained model fills each shard of a rank."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.model import upcycling_of
from nemo_upcycle.plans.layout import shards
from nemo_upcycle.plans.rank import Plan, Shard
from nemo_upcycle.trained.export import export
from nemo_upcycle.trained.opened import Trained, open_trained
from nemo_upcycle.trained.restore import check_all_restored, plan_restore
from tests.moe_checkpoints import KINDS, Weights, moe_weights, save_moe

FOLDINGS = {
    "1": (1, ParallelFolding()),
    "TP2": (2, ParallelFolding.of(tp=2)),
    "EP2": (2, ParallelFolding.of(ep=2)),
    "ETP2": (2, ParallelFolding.of(etp=2)),
    "TP2-PP2-EP2": (4, ParallelFolding.of(tp=2, pp=2, ep=2)),
}


def filled(trained: Trained, plan: Plan, owned: list[Shard]) -> list[torch.Tensor]:
    """Carry a plan out, block by block."""
    found = [torch.full(shard.shape, torch.nan) for shard in owned]
    for block, targets in plan.copies.items():
        rows, columns = block.rows, block.columns
        width = trained.checkpoint.tensors[block.tensor].shape[1:]
        if columns is not None and width:
            width = (columns[1] - columns[0],)
        values = torch.empty((rows[1] - rows[0], *width))
        buffer = memoryview(values.view(-1).view(torch.uint8).numpy())
        trained.checkpoint.read_into(buffer, block.tensor, rows, columns)
        for target in targets:
            found[target.shard][slice(*target.rows)] = values
    for target in plan.zeros:
        found[target.shard][slice(*target.rows)] = 0
    return found


def expected(weights: Weights, shard: Shard) -> torch.Tensor:
    values = weights[shard.name]
    for axis, (start, size) in enumerate(zip(shard.offset, shard.shape, strict=True)):
        values = values.narrow(axis, start, size)
    return values


@pytest.mark.parametrize("mapping", FOLDINGS)
@pytest.mark.parametrize("format", ["Megatron", "Hugging Face"])
@pytest.mark.parametrize("name", KINDS)
def test_every_shard_is_its_part_of_the_parameter(
    tmp_path: Path, name: str, format: str, mapping: str
) -> None:
    kind, weights = KINDS[name], moe_weights(KINDS[name])
    source = save_moe(tmp_path / "saved", kind, weights)
    if format == "Hugging Face":
        export(source, tmp_path / "hf")
        source = tmp_path / "hf"
    trained = open_trained(source)
    arch = trained.model.arch
    upcycling = upcycling_of(trained.model, arch.ffn_hidden_size)
    world_size, folding = FOLDINGS[mapping]
    plans = []
    for rank in range(world_size):
        owned = shards(arch, upcycling, folding, world_size, rank)
        plans.append(plan_restore(owned, trained))
        for shard, values in zip(owned, filled(trained, plans[-1], owned), strict=True):
            assert torch.equal(values, expected(weights, shard)), shard
    check_all_restored(trained, chain.from_iterable(plan.tensors for plan in plans))


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    kind = KINDS["plain"]
    return open_trained(save_moe(tmp_path / "saved", kind, moe_weights(kind)))


def test_rows_that_pad_the_vocabulary_are_zeros(trained: Trained) -> None:
    shard = Shard("output_layer.weight", (24, 8), (12, 0), (12, 8))
    (values,) = filled(trained, plan_restore([shard], trained), [shard])
    weights = moe_weights(KINDS["plain"])["output_layer.weight"]
    assert torch.equal(values[:4], weights[12:])
    assert not values[4:].any()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.layers.0.mlp.experts.0.linear_fc2.weight", (8, 24)),
        ("decoder.layers.0.mlp.router.weight", (8, 8)),
        ("decoder.layers.0.mlp.experts.0.linear_fc1.weight", (26, 8)),
    ],
)
def test_a_shard_of_another_model_is_refused(
    trained: Trained, name: str, shape: tuple[int, int]
) -> None:
    with pytest.raises(UpcyclingError, match=r"The model's .*, the checkpoint's .* another model"):
        plan_restore([Shard(name, shape, (0, 0), shape)], trained)


def test_a_parameter_that_is_not_there_is_named(trained: Trained) -> None:
    shard = Shard("decoder.layers.7.mlp.router.weight", (4, 8), (0, 0), (4, 8))
    with pytest.raises(UpcyclingError, match=r"has no decoder\.layers\.7\.mlp\.router\.weight"):
        plan_restore([shard], trained)


def test_a_tensor_that_no_rank_reads_is_named(trained: Trained) -> None:
    used = trained.checkpoint.tensors.keys() - {"decoder.layers.1.mlp.router.weight"}
    with pytest.raises(UpcyclingError, match=r"no place for 1 tensors .*layers\.1\.mlp\.router"):
        check_all_restored(trained, used)
    check_all_restored(trained, trained.checkpoint.tensors)
