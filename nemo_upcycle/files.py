"""Files that are there whole or not at all, and files that one process has at a time."""

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nemo_upcycle.errors import UpcyclingError


def name_problem(name: str, max_bytes: int, forbidden: str = "/\\") -> str | None:
    """Return why a name cannot be a file's or directory's; None where it can.

    Args:
        name: The name, without its directory.
        max_bytes: How long it may be.
        forbidden: Characters that it may not have.
    """
    if not name.strip():
        return "empty"
    if name in (".", ".."):
        return "which leads elsewhere"
    if not name.isprintable():
        return "with characters that cannot be printed"
    if characters := set(forbidden) & set(name):
        return f"with {' '.join(sorted(characters))}"
    if len(name.encode()) > max_bytes:
        return f"of more than {max_bytes} bytes"
    return None


@contextmanager
def output_directory(directory: Path) -> Iterator[None]:
    """Make a directory to write in; what was made for it and holds nothing is removed at the end.

    Args:
        directory: The directory, which may be there.
    """
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for made in missing:
            with suppress(OSError):  # it holds something, or was never made
                made.rmdir()


@contextmanager
def scratch_directory(directory: Path, name: str) -> Iterator[Path]:
    """Give a hidden directory for files that get their place in `directory` once all are whole.

    Args:
        directory: Where they belong; made, and left, as `output_directory` does.
        name: What the hidden directory's name begins with.
    """
    with (
        output_directory(directory),
        tempfile.TemporaryDirectory(dir=directory, prefix=f".{name}-") as temporary,
    ):
        yield Path(temporary)


def check_writable(directory: Path) -> None:
    """Make sure, before the work, that files can be written; the directory is made for that.

    What was made and holds nothing is removed again.

    Raises:
        UpcyclingError: They cannot.
    """
    try:
        with output_directory(directory), tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UpcyclingError(
            f"{directory} cannot be written to: {error.strerror or error}. Give another one, or "
            "change its permissions."
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, in one moment for whoever looks; its directory is made where it is not.

    Args:
        path: The file; what is there is replaced.
        content: Text, in UTF-8, or bytes.
    """
    # Of this process alone: another may write the same file.
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with output_directory(path.parent):
        try:
            new.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed at the end, or removed after an error.

    Args:
        directory: The directory, which must not be there at the end.
    """
    partial = directory.with_name(directory.name + ".partial")
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        if partial.exists():  # left by a killed process
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def lock(file: IO[Any]) -> bool:
    """Lock an open file for whoever has it open, until the last of them has closed it or ended.

    Args:
        file: The file, open for writing: over NFS the kernel asks for that.

    Returns:
        False where another process has it.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the parent process is killed (Linux).

    Args:
        parent: The process that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # killed before the line above
            os._exit(1)


def leave_terminal() -> None:
    """Print to nowhere what went to a terminal that is gone: each line would be an error."""
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
