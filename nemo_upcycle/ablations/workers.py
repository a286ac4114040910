"""Trainings in processes, which a server process starts.

On CPU the server imports NeMo once and forks one process per training. On a GPU each training is a
new process, one at a time: CUDA does not survive a fork, and imports of NeMo may have touched CUDA.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from nemo_upcycle.ablations.results import Job

    Tasks = list[tuple[Job, float | None]]
    """Trainings, each with the latest time at which it may start."""

_ENDED = "[ablate] "
"""Start of the log line that states why a training failed."""

_TOO_LATE = "too late"


def train_all(
    jobs: "Sequence[Job]",
    workers: int,
    logs: Path,
    deadline: float | None = None,
    expected: "Callable[[Job], float]" = lambda job: 0.0,
) -> "Iterator[Job]":
    """Run trainings in parallel; yield each training when its result is stored.

    Args:
        jobs: The trainings, all on the same accelerator.
        workers: Number of parallel trainings, each on one core; ignored on a GPU.
        logs: Directory of the logs; only logs of failed trainings are kept.
        deadline: Time of `time.time` after which no training may end; None for no limit.
        expected: The seconds that a training is expected to take. Trainings that would end after
            the deadline are not started, and not yielded.

    Raises:
        UpcyclingError: A training fails. Running trainings are ended; stored results are kept.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    base = jobs[0].arm.base
    if base.accelerator == "gpu":
        workers = 1
    else:
        # One thread per process: the processes occupy all cores, and threads would not survive a
        # fork.
        os.environ["OMP_NUM_THREADS"] = "1"
    latest = [None if deadline is None else deadline - expected(job) for job in jobs]
    tasks = list(zip(jobs, latest, strict=True))
    server = context.Process(target=_serve, args=(theirs, tasks, workers, logs, base.start_method))
    server.start()
    theirs.close()
    try:
        for _ in jobs:
            number, code = ours.recv()
            if code == _TOO_LATE:
                continue
            if code or jobs[number].result() is None:
                raise UpcyclingError(_failure(jobs[number], code, logs))
            yield jobs[number]
    except EOFError:
        raise UpcyclingError(
            "The process that starts the trainings has died; what it said is in "
            f"{logs / 'server.log'}. The same command goes on."
        ) from None
    finally:
        ours.close()  # the server then ends all trainings and exits
        server.join()


def train_missing(
    jobs: "Sequence[Job]",
    workers: int,
    logs: Path,
    show: Callable[..., None],
    deadline: float | None = None,
    expected: "Callable[[Job], float]" = lambda job: 0.0,
) -> None:
    """Run the trainings whose results are missing.

    Args:
        jobs: The trainings, all on the same accelerator.
        workers: See `train_all`.
        logs: See `train_all`.
        show: Called with the FLOPs done, the FLOPs in total, and the training's name.
        deadline: See `train_all`.
        expected: See `train_all`.

    Raises:
        UpcyclingError: A training fails.
    """
    todo = [job for job in jobs if job.result() is None]
    if not todo:
        return
    # In FLOPs, so that the remaining time can be estimated.
    total, done = sum(job.flops for job in todo), 0.0
    for job in train_all(todo, workers, logs, deadline, expected):
        done += job.flops
        show(done, total, job.name)
    shutil.rmtree(logs)


def _failure(job: "Job", code: int, logs: Path) -> str:
    log = logs / f"{job.name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line.removeprefix(_ENDED).rstrip(".") for line in lines if line.startswith(_ENDED)]
    why = said[-1] if said else f"its process ended with exit code {code}"
    return f"The training {job.name} has failed: {why}. All it said is in {log}."


def _serve(connection: Connection, tasks: "Tasks", workers: int, logs: Path, start: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing the pipe
    _print_to(logs / "server.log")
    if start == "fork":
        import torch

        from nemo_upcycle.ablations import training

        assert training
        torch.set_num_threads(1)
    running: dict[Any, tuple[int, Any]] = {}
    with tempfile.TemporaryDirectory(dir=logs.parent, prefix=".training-") as scratch:
        try:
            _start_all(connection, tasks, workers, running, (Path(scratch), logs), start)
        except (EOFError, OSError):
            traceback.print_exc()  # usually the parent has ended
        finally:
            for _, process in running.values():
                process.kill()
                process.join()
    os._exit(0)  # an orderly end of NeMo's imports takes seconds


def _start_all(
    connection: Connection,
    tasks: "Tasks",
    workers: int,
    running: dict[Any, tuple[int, Any]],
    directories: tuple[Path, Path],
    start: str,
) -> None:
    """Start a process per job and report exit codes, until all have ended or the pipe is closed."""
    context: Any = multiprocessing.get_context(start)
    waiting = list(enumerate(tasks))
    while waiting or running:
        while waiting and len(running) < workers:
            number, (job, latest) = waiting.pop(0)
            if latest is not None and time.time() > latest:
                connection.send((number, _TOO_LATE))
                continue
            process = context.Process(target=_train, args=(connection, job, *directories))
            process.start()
            running[process.sentinel] = number, process
        if not running:
            break
        for ready in wait([connection, *running]):
            if ready is connection:
                connection.recv()  # raises EOFError: nothing is ever sent, so the pipe was closed
            number, process = running.pop(ready)
            process.join()
            connection.send((number, process.exitcode))


def _train(connection: Connection, job: "Job", scratch: Path, logs: Path) -> None:
    began = time.perf_counter()
    connection.close()
    log = logs / f"{job.name}.log"
    _print_to(log)
    from nemo_upcycle.ablations.training import train

    directory = scratch / job.name
    try:
        train(job, directory, began)
    except Exception as error:
        traceback.print_exc()
        print(f"{_ENDED}{type(error).__name__}: {error}".replace("\n", " "))
        sys.exit(1)
    shutil.rmtree(directory, ignore_errors=True)
    log.unlink()


def _print_to(path: Path) -> None:
    """Redirect all output of this process and its children to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
