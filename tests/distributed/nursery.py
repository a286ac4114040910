"""Ranks that may be killed: a process that has imported NeMo forks them, new ones for each run.

Importing NeMo takes 10 s; a fork, nothing. The ranks of a run are one process group, with all
processes that they start.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from tests import progress
from tests.distributed.pool import forks, pretend_torchrun


class Run:
    """Ranks that are running, or have."""

    def __init__(self, nursery: "Nursery", pids: list[int], directory: Path) -> None:
        self._nursery = nursery
        self.pids = pids
        self.directory = directory

    def wait(self, *ranks: int) -> list[int | None]:
        """Return the ranks' exit codes, of all if none is named; None of one that hangs."""
        which = list(ranks or range(len(self.pids)))

        def ended(seconds: float) -> bool:
            return None not in self._nursery.ask("wait", which, seconds)

        progress.wait(ended, self.pids)
        return self._nursery.ask("wait", which, 0.0)

    def runs(self, rank: int, seconds: float = 0.1) -> bool:
        """Return whether a rank still runs after some seconds."""
        return self._nursery.ask("wait", [rank], seconds) == [None]

    def said(self, rank: int) -> str:
        """Return what a rank has printed."""
        return (self.directory / f"{rank}.log").read_text(errors="replace")

    def result(self, rank: int) -> Any:
        """Return what the function returned on a rank."""
        try:
            return pickle.loads((self.directory / f"{rank}.pickle").read_bytes())
        except FileNotFoundError:
            raise AssertionError(
                f"rank {rank} returned nothing: {self.said(rank)[-3000:]}"
            ) from None

    def left_over(self) -> list[psutil.Process]:
        """Return the processes of the run that are still there."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.getpgid(process.pid) == self.pids[0]:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill every process of the run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pids[0], signal.SIGKILL)


class Nursery:
    """A process that forks ranks; one run at a time."""

    def __init__(self) -> None:
        context = forks()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        self._directory = tempfile.TemporaryDirectory()
        self._runs: list[Run] = []

    def start(self, function: Callable[..., Any], world_size: int, **kwargs: Any) -> Run:
        """Call `function(**kwargs)` on forked ranks, which find what torchrun sets."""
        for run in self._runs[-1:]:
            run.kill()
        directory = Path(self._directory.name) / str(len(self._runs))
        directory.mkdir()
        pids = self.ask("start", function, kwargs, world_size, directory)
        self._runs.append(Run(self, pids, directory))
        return self._runs[-1]

    def ask(self, *request: Any) -> Any:
        """Have the process do something."""
        self._connection.send(request)
        return self._connection.recv()

    def stop(self) -> None:
        """End all processes."""
        for run in self._runs[-1:]:
            run.kill()
        self._process.kill()
        self._process.join()
        self._directory.cleanup()


def _serve(connection: Connection) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    from nemo_upcycle.nemo import cpu
    from tests import imported

    assert imported
    cpu.enable()
    context = multiprocessing.get_context("fork")
    ranks: list[Any] = []
    with contextlib.suppress(EOFError):
        while True:
            match connection.recv():
                case "start", function, kwargs, world_size, directory:
                    for process in ranks:  # which have been killed, if they had not ended
                        process.join()
                    ranks.clear()
                    leader = 0
                    for rank in range(world_size):
                        arguments = function, kwargs, rank, world_size, directory, leader
                        ranks.append(context.Process(target=_rank, args=arguments))
                        ranks[-1].start()
                        leader = ranks[0].pid
                        os.setpgid(ranks[-1].pid, leader)
                    connection.send([process.pid for process in ranks])
                case "wait", which, timeout:
                    connection.send([_exit_code(ranks[rank], timeout) for rank in which])


def _exit_code(process: Any, timeout: float) -> int | None:
    """Return a rank's exit code, or None after some seconds.

    The rank stays a zombie, so that no other process gets the number of the ranks' group.
    """
    end = time.monotonic() + timeout
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (ended := os.waitid(os.P_PID, process.pid, how)) is None:
        if time.monotonic() > end:
            return None
        time.sleep(0.02)
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _rank(
    function: Callable[..., Any],
    kwargs: dict[str, Any],
    rank: int,
    world_size: int,
    directory: Path,
    leader: int,
) -> None:
    with contextlib.suppress(PermissionError):
        os.setpgid(0, leader)
    log = os.open(directory / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    pretend_torchrun(rank, world_size, directory / "store")
    answer = function(**kwargs)
    partial = directory / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(answer))
    partial.rename(directory / f"{rank}.pickle")
