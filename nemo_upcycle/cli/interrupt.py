"""Ctrl-C, SIGTERM and SIGHUP under `nemo`: the ranks save and stop, also if `nemo` is killed.

NeMo-Run starts local jobs in separate sessions, so signals of a terminal or a scheduler reach
NeMo-Run alone. NeMo-Run waits for the jobs in threads: a first Ctrl-C does nothing; a second, or
any other signal, leaves the jobs behind.
"""

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from types import FrameType
from typing import Any

from nemo_upcycle.cli import killed
from nemo_upcycle.files import leave_terminal

_TOLD_BY = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
_PASSED_ON = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
"""Signals sent to the ranks, by the signal received."""

_launchers: list[Popen[bytes]] = []
_watchers: list[Popen[bytes]] = []
_told: list[int] = []


def listen() -> None:
    """Handle signals from here on, for the jobs that this process starts."""
    from nemo_run.run.torchx_backend.schedulers.local import PersistentLocalScheduler

    if threading.current_thread() is not threading.main_thread():  # only the main thread can
        return
    schedule = PersistentLocalScheduler.schedule

    def schedule_and_remember(self: Any, dryrun_info: Any) -> str:
        app_id = schedule(self, dryrun_info)
        replicas = self._apps[app_id].role_replicas.values()
        for each in replicas:
            for replica in each:
                remember(replica.proc)
                killed.remember(replica.proc, getattr(replica.stderr, "name", None))
        return app_id

    PersistentLocalScheduler.schedule = schedule_and_remember
    for number in _TOLD_BY:
        # A shell makes background jobs ignore Ctrl-C; nohup makes them ignore SIGHUP.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _received)


def remember(launcher: Popen[bytes]) -> None:
    """Pass signals on to the ranks of a job; if this process is killed, the ranks stop.

    Args:
        launcher: The job's first process: torchrun.
    """
    _launchers.append(launcher)
    if not _watchers:
        atexit.register(_end_watchers)
    # The watcher reads a pipe that only this process can write to, and so notices its end.
    watch = f"read -r _; kill -TERM {launcher.pid}"
    _watchers.append(
        Popen(
            ("/bin/sh", "-c", watch),
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=DEVNULL,
            start_new_session=True,
        )
    )


def _received(number: int, frame: FrameType | None) -> None:
    signum = signal.Signals(number)
    running = [launcher for launcher in _launchers if launcher.poll() is None]
    if not running:
        _as_ever(signum, frame)
        return
    if signum == signal.SIGHUP:
        leave_terminal()
    if _told and signum != signal.SIGINT:  # such as a signal to all processes of a job
        return
    ranks = [rank for launcher in running for rank in _children(launcher.pid)]
    if _told or not ranks or not all(_listens(rank) for rank in ranks):
        # torchrun first, which would report the end of the ranks as a long failure.
        _kill([launcher.pid for launcher in running] + ranks)
        name = _TOLD_BY[signum]
        _write_line(
            f"{name} again: ended at once" if _told else f"{name}: ended, there was nothing to save"
        )
        _end_watchers()
        os._exit(_exit_code(signum))
    _told.extend(ranks)
    _write_line(
        f"{_TOLD_BY[signum]}: the ranks save at the end of their step and stop; Ctrl-C "
        f"{'again ' if signum == signal.SIGINT else ''}ends them at once"
    )
    for rank in ranks:
        os.kill(rank, _PASSED_ON.get(signum, signal.SIGTERM))
    atexit.register(_exit, _exit_code(signum))  # NeMo-Run ends with 0


def _as_ever(signum: signal.Signals, frame: FrameType | None) -> None:
    """Apply a signal's default action."""
    if signum == signal.SIGINT:
        signal.default_int_handler(signum, frame)
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _exit_code(signum: signal.Signals) -> int:
    return 128 + _PASSED_ON.get(signum, signal.SIGTERM)


def _children(process: int) -> list[int]:
    """Return the child processes of a process; those of torchrun are the ranks."""
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return []


def _listens(rank: int) -> bool:
    """Return whether a rank has begun to train: from then on SIGTERM does not end the rank."""
    try:
        status = Path(f"/proc/{rank}/status").read_text()
    except OSError:
        return False
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def _kill(processes: list[int]) -> None:
    """Kill processes that each lead a process group, with everything they have forked."""
    for process in processes:
        try:
            os.killpg(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _write_line(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(1, f"\n[nemo-upcycle] {text}\n".encode())


def _end_watchers() -> None:
    for watcher in _watchers:
        watcher.kill()
        watcher.wait()


def _exit(code: int) -> None:
    for launcher in _launchers:  # also if NeMo-Run has failed while printing
        launcher.wait()
    _end_watchers()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
