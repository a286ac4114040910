"""Files that are there whole or not at all, and files that one process has at a time."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO, Any


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
