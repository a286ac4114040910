"""Fixtures of the tests on Megatron's own training library, which NeMo 2 cannot be beside."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from tests.megatron.grid import Grid

collect_ignore_glob = [] if find_spec("megatron.training") else ["test_*.py"]


@pytest.fixture(scope="session")
def megatron_grid(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> "Grid":
    """All mappings, each run once."""
    from tests.megatron.grid import Grid

    return Grid(ranks, tmp_path_factory.mktemp("megatron_grid"))
