"""Fixtures that all tests share."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.nursery import Nursery
from tests.distributed.pool import RankPool
from tests.tiny import write_llama


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what is imported by now, most of all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes for tests over gloo."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint in one file."""
    return write_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Processes for tests that kill ranks."""
    started = Nursery()
    yield started
    started.stop()
