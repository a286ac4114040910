"""The NeMo front fills a model as Megatron's front does, on other versions of everything."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.checkpoint.beside import FIELD
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine import load
from nemo_upcycle.trained.export import export
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.distributed.whole import whole
from tests.stacks import DIGESTS, EXPORT_DIGEST, digest, files_digest, write_by_numbers


def upcycled(dense: Path, source: str, initializer: str) -> scenarios.Shards:
    """Upcycle on one rank."""
    upcycling = UpcyclingConfig(initializer=initializer)
    chunks = scenarios.build(dense, ParallelFolding(), upcycling)
    load.fill(chunks, open_branches(source), upcycling)
    return scenarios.shards(chunks)


@pytest.mark.parametrize("way", DIGESTS)
def test_weights_are_those_of_megatrons_front(ranks: RankPool, tmp_path: Path, way: str) -> None:
    dense = write_by_numbers(tmp_path / "dense")
    branch = write_by_numbers(tmp_path / "branch", salt=1)
    source, initializer = str(dense), way
    if way == "branches":
        source, initializer = f"{dense},{branch}", "copy"
    shards = ranks.run(upcycled, 1, dense=dense, source=source, initializer=initializer)
    assert digest(whole(shards[0])) == DIGESTS[way]


def save_as_nemo(dense: Path, directory: Path) -> None:
    """Upcycle and save as NeMo 2 does, with the record of the callback."""
    scenarios.upcycled_and_saved_as_nemo(dense, ParallelFolding(), UpcyclingConfig(), directory)
    path = directory / "weights" / "common.pt"
    common = torch.load(path, weights_only=False)
    torch.save({**common, "callbacks": {"UpcyclingCallback": {FIELD: kept_of(dense)}}}, path)


def test_the_export_is_that_of_megatrons_front(ranks: RankPool, tmp_path: Path) -> None:
    dense = write_by_numbers(tmp_path / "dense")
    ranks.run(save_as_nemo, 1, dense=dense, directory=tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "exported")
    assert files_digest(tmp_path / "exported") == EXPORT_DIGEST
