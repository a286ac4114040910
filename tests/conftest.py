"""Fixtures that all tests share."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_upcycle.data import remote
from nemo_upcycle.data.tokenizer import train_tokenizer
from tests.blends import write_blend
from tests.corpora import TEXTS, write
from tests.distributed.nursery import Nursery
from tests.distributed.pool import RankPool
from tests.file_server import FileServer, serve
from tests.redpajama import write_data_set
from tests.tiny import write_llama

SHARED = ("grid", "runs")
"""Fixtures of a session in which tests of several files find what others have computed."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a file, and files that share a fixture of `SHARED`, in one process of pytest-xdist."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    groups = {
        item.path: fixture
        for item in items
        for fixture in SHARED
        if fixture in getattr(item, "fixturenames", ())
    }
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups.get(item.path, str(item.path))))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Check the groups; have the garbage collector pass over what is imported by now.

    What is imported is most of all objects.
    """
    if getattr(session.config.option, "loadgroup", False):  # set in its workers
        ungrouped = [item.nodeid for item in session.items if "@" not in item.nodeid]
        # Then each test may run in any process, and each process makes all fixtures again.
        assert not ungrouped, f"pytest-xdist does not group {ungrouped[0]}"
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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that was trained on `corpora.TEXTS`."""
    root = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([write(root / "corpus.jsonl", TEXTS)], root / "tokenizer", 280)
    return root / "tokenizer"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """An HTTP server of `tmp_path / "served"`; what reads from it does not wait between tries."""
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0, 0.0))
    (tmp_path / "served").mkdir(exist_ok=True)
    with serve(tmp_path / "served") as server:
        yield server


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """RedPajama-V2, which `server` serves."""
    return write_data_set(tmp_path / "served")


@pytest.fixture
def blend(tmp_path: Path) -> Path:
    """A blend's YAML, beside its documents."""
    return write_blend(tmp_path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with datasets, some of which have spaces."""
    for name in ("web", "my data/web", "my data/two words", "0.5", "ends.bin"):
        for suffix in (".bin", ".idx"):
            path = tmp_path / f"{name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path
