"""A run that is killed and started again goes on; one that would go on otherwise is refused."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.checkpoint.beside import UPCYCLED_FROM
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.report.page import write_report
from tests.distributed.pool import RankError, RankPool
from tests.megatron import loop
from tests.megatron.scenarios import UPCYCLING
from tests.tiny import write_llama

FOLDING = ParallelFolding.of(tp=2, ep=2)
COMMAND = {"folding": FOLDING, "upcycling": UPCYCLING, "steps": 4}


@pytest.fixture(scope="module")
def mortal() -> Iterator[RankPool]:
    """Ranks that may be killed."""
    pool = RankPool(size=2)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def killed(mortal: RankPool, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed after its third step."""
    run = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(RankError, match="died"):
        mortal.run(loop.train, 2, dense=dense, run=run, killed_after=3, **COMMAND)
    assert (run / loop.TRACKER).read_text() == "2"
    return run


@pytest.fixture
def resumable(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_a_killed_run_goes_on(
    mortal: RankPool, dense: Path, resumable: Path, tmp_path: Path
) -> None:
    resumed = mortal.run(loop.train, 2, dense=dense, run=resumable, **COMMAND)
    whole = mortal.run(loop.train, 2, dense=dense, run=tmp_path / "uninterrupted", **COMMAND)
    assert "step 0            exact" in whole[0]["said"]
    assert "not upcycling again" in resumed[0]["said"]
    assert "step 0" not in resumed[0]["said"]
    for one, other in zip(resumed, whole, strict=True):
        assert list(one["losses"]) == [3, 4]
        assert list(other["losses"]) == [1, 2, 3, 4]
        assert one["losses"] == {step: other["losses"][step] for step in (3, 4)}


def test_the_page_about_a_run(dense: Path, resumable: Path) -> None:
    written = write_report(resumable)
    page = written.path.read_text()
    assert f"upcycled from {dense}" in page
    assert "Step 0: exact" in page
    assert "EP2: 2 ranks, 2 per node" in page
    assert "Loss" in written.missing
    assert "Parallel mapping" not in written.missing


def check_refused(told: list[dict[str, Any]]) -> None:
    """Check that every rank was told of another dense checkpoint than the run's first."""
    for rank, each in enumerate(told):
        assert "are others or were changed since" in each["error"]
        assert f"[upcycle] rank {rank}: The run in" in each["said"]


def test_a_changed_dense_checkpoint_is_refused(
    mortal: RankPool, resumable: Path, tmp_path: Path
) -> None:
    other = write_llama(tmp_path / "other", seed=7)
    check_refused(mortal.run(loop.train, 2, dense=other, run=resumable, **COMMAND))


def test_a_hook_that_does_not_check_the_resume_is_seen(
    mortal: RankPool, resumable: Path, tmp_path: Path
) -> None:
    other = write_llama(tmp_path / "other", seed=7)
    told = mortal.run(
        loop.train, 2, dense=other, run=resumable, breakage="no_resume_check", **COMMAND
    )
    assert "step 0" in told[0]["said"]  # of a run that has steps behind it
    with pytest.raises(KeyError, match="error"):
        check_refused(told)


def test_another_upcycling_is_refused(mortal: RankPool, dense: Path, resumable: Path) -> None:
    command = {**COMMAND, "upcycling": replace(UPCYCLING, initializer="drop")}
    told = mortal.run(loop.train, 2, dense=dense, run=resumable, **command)
    assert "initializer=copy; now initializer=drop is given" in told[0]["error"]


def test_what_is_not_recorded_is_said(mortal: RankPool, dense: Path, resumable: Path) -> None:
    (resumable / UPCYCLED_FROM).unlink()
    told = mortal.run(loop.train, 2, dense=dense, run=resumable, **COMMAND)
    assert "does not say what the run was begun with" in told[0]["said"]
    assert list(told[0]["losses"]) == [3, 4]


def test_a_damaged_record_is_refused(mortal: RankPool, dense: Path, resumable: Path) -> None:
    path = resumable / UPCYCLED_FROM
    path.write_text(path.read_text()[:50])
    told = mortal.run(loop.train, 2, dense=dense, run=resumable, **COMMAND)
    assert "The file is damaged: restore the file, or remove" in told[0]["error"]


def test_a_start_without_a_checkpoint_is_a_fresh_one(
    mortal: RankPool, dense: Path, resumable: Path
) -> None:
    """As where the first start was killed before it saved."""
    (resumable / loop.TRACKER).unlink()
    path = resumable / UPCYCLED_FROM
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "another"}))
    told = mortal.run(loop.train, 2, dense=dense, run=resumable, **COMMAND)
    assert list(told[0]["losses"]) == [1, 2, 3, 4]
    assert json.loads(path.read_text())["fingerprint"] != "another"
