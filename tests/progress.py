"""Waiting for processes for as long as they work: a busy machine makes a test late, not red.

Ranks that wait for each other for ever are alive, but use next to no processor time: gloo's threads
take 0.3% of a core per rank.
"""

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence

import psutil

QUIET_S = 300.0
"""Processes that do nothing for so many seconds hang."""

LEAST_SHARE = 0.01
"""Of a core: a process that uses less does nothing. Of 200 that share two cores each gets more."""

LAST_S = 30.0
"""How long what processes have done may take to be seen once they have ended, in seconds."""


def wait(done: Callable[[float], object], pids: Iterable[int], quiet_s: float = QUIET_S) -> bool:
    """Wait until something is so, or the processes that bring it about hang or have ended.

    Args:
        done: Waits for at most so many seconds, and returns whether the thing is so.
        pids: The processes; those that they have started count too.
        quiet_s: Processes that do nothing for so many seconds hang.

    Returns:
        Whether the thing is so.
    """
    roots, wait_s = list(pids), min(1.0, quiet_s / 4)
    if done(wait_s):  # to look at all processes takes longer than most calls of ranks
        return True
    before, since = _cpu_seconds(roots), time.monotonic()
    while not done(wait_s):
        now = _cpu_seconds(roots)
        if any(used - before.get(pid, 0.0) > LEAST_SHARE * quiet_s for pid, used in now.items()):
            before, since = now, time.monotonic()
        elif not now:
            return bool(done(LAST_S))
        elif time.monotonic() - since > quiet_s:
            return False
    return True


def until(so: Callable[[], object], pids: Iterable[int], every_s: float = 0.02) -> bool:
    """Look again and again whether something is so; see `wait`."""

    def done(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not so():
            if time.monotonic() > end:
                return False
            time.sleep(every_s)
        return True

    return wait(done, pids)


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait for a program to end, and return its exit code.

    Raises:
        AssertionError: The program hangs; it is killed.
    """
    if not until(lambda: process.poll() is not None, [process.pid]):
        process.kill()
        process.wait()
        raise AssertionError(f"{process.args} does nothing")
    return process.returncode


def _cpu_seconds(roots: Sequence[int]) -> dict[int, float]:
    """Return the processor time of each process that is alive, and of each that it has started."""
    found: dict[int, float] = {}
    for root in roots:
        try:
            family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in family:
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    times = process.cpu_times()
                    found[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
    return found
