"""A lock that lets only one start of a run at a time write the run's directory."""

import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from nemo.utils import AppState

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import lock

FILE = ".lock"
SECONDS_TO_WAIT = 10.0
"""Waiting time for the previous start, in seconds; the kernel may still be ending a killed one."""

_held: dict[Path, IO[Any]] = {}


def take(directory: Path, seconds_to_wait: float = SECONDS_TO_WAIT) -> None:
    """Lock a run's directory for this process, until `release` or the end of the process.

    Forked processes do not hold the lock, and so cannot keep it after this process ends.

    Args:
        directory: The run's directory, which must exist.
        seconds_to_wait: Maximum waiting time for another start to end.

    Raises:
        UpcyclingError: Another start of the run holds the lock.
    """
    if directory in _held:
        return
    # NeMo moves a run's files away at a new start; the lock file must stay.
    state = AppState()
    moved = getattr(state, "files_to_move", None) or []
    state.files_to_move = [path for path in moved if Path(path).name != FILE]
    file = (directory / FILE).open("a+")
    deadline = time.monotonic() + seconds_to_wait
    try:
        while not lock(file):
            if time.monotonic() > deadline:
                raise _refused(file, directory)
            time.sleep(0.2)
    except OSError as error:
        print(f"[run] {directory} cannot be locked ({error}): start this run once at a time")
    except UpcyclingError:
        file.close()
        raise
    file.truncate(0)
    json.dump(_holder(), file)
    file.flush()
    _held[directory] = file
    # A forked child closes the inherited file; the lock stays with the parent.
    os.register_at_fork(after_in_child=file.close)


def release(directory: Path) -> None:
    """Unlock a run's directory."""
    if (file := _held.pop(directory, None)) is not None:
        file.close()


def _holder() -> dict[str, Any]:
    holder = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    job = os.environ.get("SLURM_JOB_ID")
    return holder | ({"job": job} if job else {})


def _refused(file: IO[Any], directory: Path) -> UpcyclingError:
    file.seek(0)
    try:
        holder = ", ".join(f"{name} {value}" for name, value in json.loads(file.read()).items())
    except (ValueError, AttributeError):
        holder = "which has not said who it is"
    return UpcyclingError(
        f"Another start of this run is at work in {directory} ({holder}). Wait until it has ended, "
        "or give this run another name. If there is none, as where a machine was lost and its file "
        f"server does not know yet, remove {directory / FILE}."
    )
