"""Fixtures of the tests over several ranks."""

import pytest

from tests.distributed.grid import Grid
from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def grid(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """All mappings, each run once."""
    return Grid(ranks, tmp_path_factory.mktemp("grid"))
