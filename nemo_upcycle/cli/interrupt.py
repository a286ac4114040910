"""Ctrl-C under `nemo`: the ranks save and stop.

NeMo-Run starts the jobs of this machine in sessions of their own, so a terminal tells NeMo-Run
alone, which waits for them in threads: the first Ctrl-C does nothing, the second leaves them
behind.
"""

import atexit
import os
import signal
import sys
import threading
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGINT

_launchers: list[Popen[bytes]] = []
_told: list[int] = []


def listen() -> None:
    """Listen for Ctrl-C from here on, for the jobs that this process starts."""
    from nemo_run.run.torchx_backend.schedulers.local import PersistentLocalScheduler

    # Only the main thread can; a shell has background jobs ignore Ctrl-C.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    schedule = PersistentLocalScheduler.schedule

    def schedule_and_remember(self: Any, dryrun_info: Any) -> str:
        app_id = schedule(self, dryrun_info)
        replicas = self._apps[app_id].role_replicas.values()
        _launchers.extend(replica.proc for each in replicas for replica in each)
        return app_id

    PersistentLocalScheduler.schedule = schedule_and_remember
    signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    running = [launcher for launcher in _launchers if launcher.poll() is None]
    if not running:
        signal.default_int_handler(number, frame)
    ranks = [rank for launcher in running for rank in _children(launcher.pid)]
    if _told or not ranks or not all(_listens(rank) for rank in ranks):
        # torchrun first, which would report the ranks' end as a failure, at length.
        _kill([launcher.pid for launcher in running] + ranks)
        _say("Ctrl-C again: ended at once" if _told else "Ctrl-C: ended, there was nothing to save")
        os._exit(EXIT_CODE)
    _told.extend(ranks)
    _say("Ctrl-C: the ranks save at the end of their step and stop; again ends them at once")
    for rank in ranks:
        os.kill(rank, signal.SIGINT)
    atexit.register(_exit)  # NeMo-Run ends with 0


def _children(process: int) -> list[int]:
    """Return what a process has started: of torchrun, the ranks."""
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return []


def _listens(rank: int) -> bool:
    """Say whether a rank has begun to train: from then on SIGTERM does not end it."""
    try:
        status = Path(f"/proc/{rank}/status").read_text()
    except OSError:
        return False
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def _kill(processes: list[int]) -> None:
    """Kill processes that lead a group each, with what they have forked."""
    for process in processes:
        try:
            os.killpg(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _say(text: str) -> None:
    os.write(1, f"\n[nemo-upcycle] {text}\n".encode())


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)
