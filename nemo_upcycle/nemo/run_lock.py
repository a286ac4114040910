"""A run's directory is written by one start of the run at a time."""

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
"""How long a start waits for the one before: the kernel may still be clearing away a killed one."""

_held: dict[Path, IO[Any]] = {}


def take(directory: Path, seconds_to_wait: float = SECONDS_TO_WAIT) -> None:
    """Take a run's directory for this process, until it ends, however it does, or `release`.

    Processes that it forks do not have it, and so do not keep it when they outlive it.

    Args:
        directory: The run's directory, which is there.
        seconds_to_wait: How long to wait for another start to end.

    Raises:
        UpcyclingError: Another start of the run has it.
    """
    if directory in _held:
        return
    # NeMo moves a run's files away as a new start of it begins: this one must stay.
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
    # What a forked process has inherited is closed there; the lock stays with its parent.
    os.register_at_fork(after_in_child=file.close)


def release(directory: Path) -> None:
    """Let other processes have a run's directory."""
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
