"""Accidents while a run saves or upcycles: what is said, what is left, what the next start does."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import progress
from tests.distributed.nursery import Nursery, Run
from tests.distributed.training import EP2, train
from tests.thorough import thorough
from tests.workspace import make_workspace

STEPS = 5
SAVE_EVERY_STEP = {
    "trainer.limit_val_batches": 0,
    "data.global_batch_size": 4,
    "data.micro_batch_size": 2,
    "log.ckpt.every_n_train_steps": 1,
}

CHANGES = [2, 6, 14, 30, 1, 12, 23, 30]
"""Where a run is killed, start after start: before the n-th change to its checkpoints.

The first checkpoint takes 14 to 20 changes. Later ones then remove the checkpoint before, and the
start after a kill what is unfinished.
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def start(
    nursery: Nursery,
    workspace: Path,
    name: str,
    overrides: dict[str, Any] | None = None,
    **how: Any,
) -> Run:
    return nursery.start(
        train,
        2,
        directory=workspace,
        options={"name": name, "max_steps": STEPS, **EP2},
        overrides=SAVE_EVERY_STEP | (overrides or {}),
        **how,
    )


def losses(run: Run) -> list[float]:
    assert run.wait() == [0, 0], run.said(0)[-3000:]
    result = run.result(0)
    assert not isinstance(result, str), result
    return result[0]


def complete(workspace: Path, name: str) -> list[int]:
    """Return the steps of a run's complete checkpoints, by what is on the disk."""
    steps = []
    for path in (workspace / name / "checkpoints").glob("*-last"):
        unfinished = path.with_name(path.name + "-unfinished").exists()
        files = {file.name for file in (path / "weights").glob("*")}
        if not unfinished and {".metadata", "metadata.json", "common.pt"} <= files:
            steps.append(int(re.search(r"step=(\d+)", path.name)[1]))
    return sorted(steps)


@pytest.mark.thorough
def test_killed_at_any_moment_it_goes_on_from_the_last_complete_checkpoint(
    nursery: Nursery, workspace: Path
) -> None:
    expected = losses(start(nursery, workspace, "uninterrupted"))
    last, moments = -1, []
    for change in CHANGES:
        run = start(nursery, workspace, "killed", accident=("KillAtChange", {"change": change}))
        assert run.wait() == [-signal.SIGKILL] * 2, run.said(0)[-3000:]
        said = run.said(0)
        if last < 0:
            assert "starting anew" in said
        else:
            assert re.search(rf"resuming from \S+step={last}-\S+: not upcycling again", said)
        moments.append(said.rpartition("[change ")[2].splitlines()[0])
        found = complete(workspace, "killed")
        assert not found or found[-1] >= last
        assert found or last < 0, moments
        last = found[-1] if found else -1
    assert 0 <= last < STEPS - 1, moments
    assert losses(start(nursery, workspace, "killed")) == pytest.approx(expected[last + 1 :])
    assert complete(workspace, "killed")[-1] == STEPS - 1
    assert not list((workspace / "killed" / "checkpoints").glob("*-unfinished"))


@pytest.mark.parametrize(
    ("size", "said_by_all"),
    [(500_000, True), thorough((0, False))],
    ids=["shards", "what rank 0 alone writes"],
)
def test_full_disk_is_one_error_and_the_same_command_goes_on(
    nursery: Nursery, workspace: Path, size: int, said_by_all: bool
) -> None:
    name = f"full-{size}"
    run = start(nursery, workspace, name, accident=("FullDisk", {"step": 3, "size": size}))
    assert run.wait() == [0, 0]
    errors = [run.result(rank) for rank in (0, 1)]
    for error in errors:
        assert error.startswith("UpcyclingError: The checkpoint ")
        assert "start the same command again" in error
    assert "a file could not be written in full" in errors[0]
    assert f"{workspace / name}" in errors[0]
    expected = "a file could not be written in full" if said_by_all else "another rank failed"
    assert expected in errors[1]
    assert complete(workspace, name) == [1]
    assert len(losses(start(nursery, workspace, name))) == STEPS - 2
    assert complete(workspace, name) == [STEPS - 1]


@pytest.mark.parametrize(
    ("rank", "how", "when"),
    [
        (1, signal.SIGKILL, "reading"),
        (1, signal.SIGKILL, "gather"),
        (0, signal.SIGKILL, "gather"),
        (1, signal.SIGSTOP, "reading"),
    ],
    ids=["killed", "killed in the gather", "rank 0 killed in the gather", "stopped"],
)
def test_a_rank_lost_while_upcycling_is_an_error_on_the_others(
    nursery: Nursery, workspace: Path, rank: int, how: signal.Signals, when: str
) -> None:
    accident = "LoseRank", {"rank": rank, "signal": int(how), "when": when}
    timeout = {"trainer.callbacks.-1.timeout_s": 5.0}
    run = start(nursery, workspace, "lost", timeout, accident=accident)
    assert run.wait(1 - rank) == [0]
    error = run.result(1 - rank)
    assert error.startswith("UpcyclingError: ")
    assert f"got no answer from rank {rank}, " in error
    assert f"[upcycle] rank {1 - rank}: " in run.said(1 - rank)
    run.kill()
    assert not complete(workspace, "lost")


def test_after_a_rank_was_lost_the_same_command_works(nursery: Nursery, workspace: Path) -> None:
    assert len(losses(start(nursery, workspace, "lost"))) == STEPS


def test_killed_ranks_leave_no_process(nursery: Nursery, workspace: Path) -> None:
    run = start(nursery, workspace, "orphans")
    while not complete(workspace, "orphans"):
        assert run.runs(0)
    assert len(run.left_over()) > len(run.pids), "no process that writes checkpoints"
    for pid in run.pids:
        os.kill(pid, signal.SIGKILL)
    run.wait()
    left = [process.pid for process in run.left_over()]
    assert progress.until(lambda: not run.left_over(), left)
