"""Ranks that the kernel killed under `nemo`: torchrun reports nothing but `exitcode: -9`."""

import atexit
import os
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

from nemo_upcycle.engine.launch import killed, killed_ranks

_jobs: list[tuple["Popen[bytes]", Path]] = []


def remember(launcher: "Popen[bytes]", log: str | None) -> None:
    """Report at this process's end if the kernel killed ranks of a job.

    Args:
        launcher: The job's first process: torchrun.
        log: The file that torchrun writes its report to; None if there is none.
    """
    if log is None:
        return
    if not _jobs:
        atexit.register(_report)
    _jobs.append((launcher, Path(log)))


def _report() -> None:
    from nemo_upcycle_recipes.on_host import advice

    for launcher, log in _jobs:
        with suppress(OSError):
            ranks = killed_ranks(log.read_text(errors="replace")) if launcher.poll() else []
            if ranks:
                os.write(2, f"\n[nemo-upcycle] Error: {killed(ranks, advice())}\n".encode())
