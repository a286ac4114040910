"""Run the real commands, each in processes of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import progress
from tests.end_to_end.zygote import zygote

BIN = Path(sys.executable).parent


def command(*words: str) -> list[str]:
    """Return a command of this environment, by its full path."""
    return [str(BIN / words[0]), *words[1:]]


def run(directory: Path, *words: str, forked: bool | None = None) -> str:
    """Run a command to its end and return what it printed.

    NeMo-Run exits with 0 after a failed job, so look at what came of it.

    Args:
        directory: Where it runs.
        words: The command.
        forked: Whether the process is a fork of one that has imported NeMo: by default one that
            starts no job is.
    """
    if forked is None:
        starts_jobs = "--yes" in words or "ablate" in words
        forked = words[0] in ("nemo", "nemo-upcycle") and not starts_jobs
    if forked:
        return zygote().run(directory, words)
    return run_script(directory, *command(*words))


def run_script(directory: Path, *words: str) -> str:
    """Run any program to its end and return what it printed."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            words, cwd=directory, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
        progress.exit_code(process)
        out.seek(0)
        return out.read()


def start_until(
    directory: Path, done: Callable[[], object], *words: str
) -> subprocess.Popen[bytes]:
    """Start a command, to be killed, and return it when something is so; it must still run."""
    log = directory / "killed.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(*words), cwd=directory, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
    progress.until(lambda: done() or process.poll() is not None, [process.pid])
    assert process.poll() is None, log.read_text()[-3000:]
    if not done():
        process.kill()
        raise AssertionError(f"{words} does nothing: {log.read_text()[-3000:]}")
    return process


def environment() -> dict[str, str]:
    """Return the environment with this Python's commands first and plain, wide output."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
