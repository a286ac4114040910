"""Run the real commands as a user would, each in processes of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.zygote import zygote

BIN = Path(sys.executable).parent
TIMEOUT_S = 300


def command(*words: str) -> list[str]:
    """Return a command of this environment, by its full path."""
    return [str(BIN / words[0]), *words[1:]]


def run(directory: Path, *words: str, cold: bool = False) -> str:
    """Run a command to its end and return what it printed.

    NeMo-Run exits with 0 after a failed job, so look at what came of it. A `nemo` command that
    starts no job comes from a process that has imported NeMo, unless it is to be cold.
    """
    if words[0] == "nemo" and "--yes" not in words and not cold:
        return zygote().run(directory, words[1:])
    return run_script(directory, *command(*words))


def run_script(directory: Path, *words: str, timeout: int = TIMEOUT_S) -> str:
    """Run any program to its end and return what it printed."""
    result = subprocess.run(
        words,
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return result.stdout


def start_until(
    directory: Path, done: Callable[[], object], *words: str
) -> subprocess.Popen[bytes]:
    """Start a command, to be killed, and return it when something is so; it must still run."""
    log = directory / "killed.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(*words), cwd=directory, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + TIMEOUT_S
    while not done() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, log.read_text()[-3000:]
    return process


def environment() -> dict[str, str]:
    """Return the environment with this Python's commands first and plain, wide output."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
