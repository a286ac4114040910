"""The directory of a long job beside its output: what is done there survives a kill."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import lock

_JOB = "job.json"


@contextmanager
def work_directory(work: Path, job: dict[str, Any], holds: str, other: str) -> Iterator[None]:
    """Lock the directory of a job; after an error, remove unfinished files.

    Unfinished are files named `new.*` and `*.partial`. All other files are kept for the same job,
    which goes on from them. The caller removes the directory when the output is complete.

    Args:
        work: The directory.
        job: Everything that determines what the job's files contain, as JSON.
        holds: What the files are, for errors.
        other: What may differ from another job's, for errors.

    Raises:
        UpcyclingError: Another process works in the directory, or another job's files are there.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / _JOB).open("a+") as file:
        _lock(file, work)
        before = _read_job(file)
        if before not in (None, job):
            raise UpcyclingError(
                f"{work} holds {holds} of another job: {other}. "
                "Give the same as before, another name, or remove it to start anew."
            )
        if before is None:
            _begin(work, file, job)
        try:
            yield
        except BaseException:
            for unfinished in (*work.glob("new.*"), *work.glob("*.partial")):
                unfinished.unlink(missing_ok=True)
            if {path.name for path in work.glob("*")} <= {_JOB}:
                shutil.rmtree(work, ignore_errors=True)
            raise


def _read_job(file: IO[str]) -> Any:
    """Return the job that the files belong to; None if the file is empty or truncated."""
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:
        return None


def _begin(work: Path, file: IO[str], job: dict[str, Any]) -> None:
    """Record the job of the files, and remove existing files of unknown origin."""
    for path in work.iterdir():
        if path.name != _JOB:
            path.unlink()
    file.truncate(0)
    json.dump(job, file)
    file.flush()
    os.fsync(file.fileno())


def _lock(file: IO[str], work: Path) -> None:
    try:
        taken = lock(file)
    except OSError as error:
        raise UpcyclingError(
            f"{work} cannot be locked: {error}. Use another file system."
        ) from error
    if not taken:
        raise UpcyclingError(f"Another process is at work in {work}; wait for it.")
