"""Sources of documents: files, directories, URLs, RedPajama-V2 and datasets of the hub."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO, NoReturn
from urllib.parse import urlsplit

from nemo_upcycle.data import redpajama, remote
from nemo_upcycle.errors import UpcyclingError, listing

LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
HUB = "hf://"
OURS = (".bin", ".idx", ".manifest.json", ".malformed.jsonl", ".contaminated.jsonl")
"""Suffixes of a dataset's own files, which are not documents although some are JSON lines."""

ONE_DOCUMENT_A_FILE = (
    'python -c "import json, sys; '
    "[print(json.dumps({'text': open(f).read()})) for f in sys.argv[1:]]"
    '" FILES > documents.jsonl'
)

TEXT = (".txt", ".text", ".md", ".rst", "")
PACKED = (".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".lz4", *COMPRESSED)
TABLES = (".csv", ".tsv", ".arrow")


def files_of(sources: Iterable[str]) -> list[str]:
    """Return the sources with directories and RedPajama-V2 replaced by sorted files.

    Raises:
        UpcyclingError: A source is missing, of unknown kind, or given twice.
    """
    files = [file for source in sources for file in _files_of(source)]
    if lost := [file for file in files if "://" not in file and not Path(file).is_file()]:
        raise UpcyclingError(f"{listing(lost)}: links to no file; expected documents")
    _check_given_once(files)
    return files


def passed_over(source: str) -> str:
    """Return a count per suffix of the unread files in a directory; otherwise an empty string."""
    path = Path(source).expanduser()
    files = [] if "://" in source or not path.is_dir() else list(_within(path))
    endings = Counter(_ending(file) for file in files if not _is_known(file) and not _is_ours(file))
    words = [f"{count} {ending or 'without an ending'}" for ending, count in endings.most_common()]
    return listing(words) if words else ""


def _files_of(source: str) -> list[str]:
    if source.startswith(HUB):
        return [source]
    if source.startswith(redpajama.SCHEME):
        return redpajama.excerpt(source).files()
    path = Path(source).expanduser()
    if path.is_dir():
        files = list(_within(path))
        if known := sorted(str(file) for file in files if _is_known(file) and not _is_ours(file)):
            return known
        raise UpcyclingError(
            f"no documents in {source}: {passed_over(source) or 'it is empty'}; "
            f"{_expected(max(map(_ending, files), default=None))}"
        )
    if not remote.is_url(source) and not (path.is_file() or path.is_symlink()):
        raise UpcyclingError(f"no file {source}; expected documents")
    if not _is_known(path_of(source)):
        raise UpcyclingError(f"{source}: {_expected(_ending(path_of(source)))}")
    return [source if remote.is_url(source) else str(path)]


def _within(directory: Path) -> Iterator[Path]:
    """Yield the visible files below a directory, following links."""

    def fail(error: OSError) -> NoReturn:
        raise error

    seen = set()
    for where, directories, files in os.walk(directory, onerror=fail, followlinks=True):
        real = os.path.realpath(where)
        directories[:] = [] if real in seen else [d for d in directories if not d.startswith(".")]
        if real not in seen:  # a link may lead to a parent directory
            yield from (Path(where, file) for file in files if not file.startswith("."))
        seen.add(real)


def _check_given_once(files: list[str]) -> None:
    """Check that no file is given twice, which would weight its documents twice.

    Raises:
        UpcyclingError: A file is given twice.
    """
    first: dict[str, str] = {}
    for file in files:
        same = file if "://" in file else os.path.realpath(file)
        if same in first:
            raise UpcyclingError(
                f"{file} is given twice (also as {first[same]}): its documents would be in the "
                "dataset twice. Give it once; a blend's weights say what is read more often."
            )
        first[same] = file


def check_is_lines(file: Path) -> None:
    """Check that a file's suffix is that of uncompressed JSON lines.

    Raises:
        UpcyclingError: The file has another suffix.
    """
    if kind_of(str(file)) not in LINES:
        raise UpcyclingError(
            f"{file}: expected one of {', '.join(LINES)}. {_advice(kind_of(str(file)))}"
        )


def _expected(ending: str | None) -> str:
    """Return which files are expected, and a remedy for files with this suffix."""
    kinds = ", ".join([*LINES, *(f".jsonl{end}" for end in COMPRESSED), PARQUET])
    return f"expected one of {kinds}, or {HUB}NAME. {_advice(ending)}"


def _advice(ending: str | None) -> str:
    if ending in TEXT:
        return (
            "Plain text does not say where a document ends; with each file as one: "
            f"{ONE_DOCUMENT_A_FILE}"
        )
    if ending in PACKED:
        return "Unpack it, or pack JSON lines with gzip or zstd for `data tokenize`"
    if ending in TABLES:
        return f"{HUB}DIRECTORY of `data tokenize` reads a directory of {ending} files"
    return 'JSON lines are documents such as {"text": "…"}, one per line'


def _is_known(path: PurePath) -> bool:
    return _ending(path) in LINES or kind_of(str(path)) == PARQUET


def _is_ours(path: PurePath) -> bool:
    return path.name.endswith(OURS)


def _ending(path: PurePath) -> str:
    """Return a file's suffix in lower case, without the suffix of a compression."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()


def kind_of(source: str) -> str:
    """Return a file's last suffix in lower case."""
    return path_of(source).suffix.lower()


def path_of(source: str) -> PurePath:
    """Return the path in a file name or URL; the suffixes give the file's kind."""
    return PurePath(urlsplit(source).path if remote.is_url(source) else source)


def size_of(source: str) -> int:
    """Return a file's size in bytes."""
    return remote.size_of(source) if remote.is_url(source) else Path(source).stat().st_size


def open_file(source: str) -> BinaryIO:
    """Open a file or URL for reading."""
    return remote.open_url(source) if remote.is_url(source) else Path(source).open("rb")


def name_of(source: str) -> str:
    """Return the default dataset name for a source: the last path component without suffixes."""
    if remote.is_url(source):
        source = urlsplit(source).path
    name = PurePath(source.partition("?")[0].replace("://", "/")).name.rstrip(":")
    for kind in (*COMPRESSED, *LINES, PARQUET):
        if name.lower().endswith(kind):
            name = name[: -len(kind)]
    return name


def resolved(source: str, home: Path) -> str:
    """Return a source with relative paths resolved against the directory `home`."""
    if source.startswith(HUB) or remote.is_url(source):
        return source
    if source.startswith(redpajama.SCHEME):
        base, mark, options = source.removeprefix(redpajama.SCHEME).partition("?")
        return f"{redpajama.SCHEME}{base and resolved(base, home)}{mark}{options}"
    return str(home / Path(source).expanduser())
