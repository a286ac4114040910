"""The files of a tokenizer, among all that a checkpoint's directory holds."""

import shutil
from pathlib import Path

NEEDED = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these is a tokenizer."""

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


def find_tokenizer(directory: Path, context: Path | None) -> Path | None:
    """Return the directory of a checkpoint's tokenizer, None if it has none.

    Args:
        directory: The checkpoint's.
        context: NeMo 2's `context`, which has a directory for the tokenizer.
    """
    places = [directory]
    if context is not None:
        places += sorted(path for path in context.iterdir() if path.is_dir())
    found = (p for p in places if any((p / name).is_file() for name in NEEDED))
    return next(found, None)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files out of a directory that may hold weights too."""
    for pattern in _PATTERNS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copy(path, target / path.name)
