"""Fixtures of the tests over several ranks."""

from pathlib import Path

import pytest

from tests.distributed import transformers5
from tests.distributed.grid import Grid
from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def grid(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """All mappings, each run once."""
    return Grid(ranks, tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="session")
def transformers_5() -> Path:
    """A directory with transformers 5, to be put before what is installed."""
    target = transformers5.install()
    if target is None:
        pytest.skip(f"pip cannot install {transformers5.REQUIREMENT} here")
    return target
