"""Files that are there whole or not at all."""

import os
from pathlib import Path


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
