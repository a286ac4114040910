"""Files that are there whole or not at all, and files that one process has at a time."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO, Any

from nemo_upcycle.errors import UpcyclingError


def check_writable(directory: Path) -> None:
    """Make sure, before the work, that files can be written; the directory is made for that.

    What was made and holds nothing is removed again.

    Raises:
        UpcyclingError: They cannot.
    """
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UpcyclingError(
            f"{directory} cannot be written to: {error.strerror or error}. Give another one, or "
            "change its permissions."
        ) from error
    finally:
        for made in missing:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, in one moment for whoever looks; its directory is made where it is not.

    Args:
        path: The file; what is there is replaced.
        content: Text, in UTF-8, or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: another may write the same file.
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(new, path)


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
