"""Tests wait for processes that work, and not for those that hang."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests import progress

WORKS = "while True: pass"
SLEEPS = "import time; time.sleep(3600)"
STARTS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKS!r}])"
QUIET_S = 2.0


@contextmanager
def python(script: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script, and kill what it has started with it."""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class After:
    """Something that is so after as many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self, seconds: float) -> bool:
        time.sleep(min(seconds, QUIET_S / 4))
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize(("script", "hangs"), [(WORKS, False), (STARTS, False), (SLEEPS, True)])
def test_processes_that_work_are_waited_for(script: str, hangs: bool) -> None:
    with python(script) as process:
        after = After(looks=12)  # three times as long as a process may do nothing
        assert progress.wait(after, [process.pid], QUIET_S) != hangs
        assert (after.looks >= 0) == hangs


def test_processes_that_have_ended_are_not_waited_for() -> None:
    with python("pass") as process:
        assert progress.exit_code(process) == 0
        after = After(looks=10_000)
        assert not progress.wait(after, [process.pid], QUIET_S)
        assert after.looks > 9_990
