"""Make a text corpus from the packages that are installed beside this one.

Some 500 MB where the whole environment of this package is installed: enough to train a small
model for an hour without a download. The text keeps its packages' licences: do not publish it.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_upcycle.data.sample import MIN_CHARACTERS, write_corpora
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable

KINDS = {
    "documentation": frozenset({".md", ".rst", ".txt", ".pyi"}),
    "sources": frozenset({".py"}),
}
"""File name endings per corpus; documentation includes the packages' METADATA."""

MAX_BYTES = 1_000_000
"""Size of the largest file; larger ones are tables that were written by a program."""

_METADATA = "METADATA"
# The same few texts in every package; and lists of files and of modules.
_BOILERPLATE = re.compile(
    r"(licen[sc]e|copying|notice|authors|third.?party|top_level|entry_points|sources)", re.I
)


def write_package_sample(out: Path, *, roots: Sequence[Path] | None = None) -> dict[str, Path]:
    """Write `documentation.jsonl` and `sources.jsonl` from the files of installed packages.

    A text that several files have is one document. Documents are ordered by the hash of their text:
    the last ones, which Megatron's split holds out, are a random sample of all packages. The same
    environment gives the same bytes.

    Args:
        out: Output directory, created if missing.
        roots: Directories of packages; None means those of the running interpreter, and its
            standard library.

    Returns:
        The two files, under the keys `documentation` and `sources`.

    Raises:
        UpcyclingError: A corpus has no document.
    """
    check_writable(out)
    roots = _roots() if roots is None else roots
    found = {kind: dict(sorted(_unique(roots, kind).items())) for kind in KINDS}
    for kind, files in found.items():
        if not files:
            raise UpcyclingError(
                f"There is no {kind} of packages in {', '.join(map(str, roots))}; expected files "
                f"that end with {', '.join(sorted(KINDS[kind]))}. Run this command with the Python "
                "of an environment with packages, or bring your own JSONL files with a `text` "
                "field."
            )
    return write_corpora(out, {kind: _documents(files) for kind, files in found.items()})


def _roots() -> list[Path]:
    """Return the directories of installed packages and of the standard library."""
    paths = sysconfig.get_paths()
    wanted = dict.fromkeys(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return [Path(path) for path in wanted if Path(path).is_dir()]


def _unique(roots: Sequence[Path], kind: str) -> dict[str, tuple[str, Path]]:
    """Return name and file of every distinct text of a kind, by the text's hash."""
    found: dict[str, tuple[str, Path]] = {}
    seen: set[Path] = set()
    for root in roots:
        for path in _files(root, kind):
            if path in seen:  # site-packages lies in the standard library's directory
                continue
            seen.add(path)
            text = _text(path)
            if text is not None:
                digest = hashlib.sha256(text.encode()).hexdigest()
                found.setdefault(digest, (f"{kind}:{path.relative_to(root)}", path))
    return found


def _files(root: Path, kind: str) -> Iterator[Path]:
    """Yield the files of a kind below a directory, ordered by name."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(
            name for name in subdirectories if name != "__pycache__" and not name.startswith(".")
        )
        for file in sorted(files):
            ending = os.path.splitext(file)[1]
            wanted = ending in KINDS[kind] or (kind == "documentation" and file == _METADATA)
            if wanted and not (kind == "documentation" and _BOILERPLATE.match(file)):
                yield Path(directory, file)


def _text(path: Path) -> str | None:
    """Return a file's text; None if the file is too long, too short, or not UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if len(text) >= MIN_CHARACTERS else None


def _documents(files: dict[str, tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """Yield (id, text); the texts are read again, because all of them need much memory."""
    for name, path in files.values():
        text = _text(path)
        if text is not None:
            yield name, text
