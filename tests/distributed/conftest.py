"""Fixtures of the tests over several ranks."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import transformers5
from tests.distributed.grid import Grid
from tests.distributed.nursery import Nursery
from tests.distributed.pool import RankPool
from tests.distributed.runs import STOPPED, Runs
from tests.workspace import make_workspace


@pytest.fixture(scope="module", autouse=True)
def new_ranks(ranks: RankPool) -> Iterator[None]:
    """End the ranks after each file.

    Two tests that are green in new ranks have failed in ranks that had run other files: attention
    saw a part of the sequence, and a mask of all of it. What the ranks had kept is not known.
    """
    yield
    ranks.stop()


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


@pytest.fixture(scope="session")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(nursery, make_workspace(tmp_path_factory.mktemp("workspace")))


@pytest.fixture(scope="session")
def stopped(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped half-way."""
    directory = tmp_path_factory.mktemp("stopped")
    runs.start(directory, accident=("StopAfter", {"step": STOPPED}))
    return directory / "run"


@pytest.fixture
def resumable(stopped: Path, tmp_path: Path) -> Path:
    """A directory with a copy of it."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path


@pytest.fixture(scope="session")
def expected(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that was not stopped."""
    losses, _ = runs.start(tmp_path_factory.mktemp("uninterrupted"))
    assert losses[0] == losses[1]
    return losses[0]
