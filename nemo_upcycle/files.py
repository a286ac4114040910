"""Files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path

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
