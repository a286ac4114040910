"""Where documents come from: files, directories, URLs, RedPajama-V2, the hub's data sets."""

from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import BinaryIO
from urllib.parse import urlsplit

from nemo_upcycle.data import redpajama, remote
from nemo_upcycle.errors import UpcyclingError

LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
HUB = "hf://"


def files_of(sources: Iterable[str]) -> list[str]:
    """Return the sources with directories and RedPajama-V2 replaced by their files, by name.

    Raises:
        UpcyclingError: One is not there, is of no kind that is known, or there is none.
    """
    found = [file for source in sources for file in _files_of(source)]
    if not found:
        raise UpcyclingError(f"no documents in {', '.join(sources)}")
    return found


def _files_of(source: str) -> list[str]:
    if source.startswith(HUB):
        return [source]
    if source.startswith(redpajama.SCHEME):
        return redpajama.excerpt(source).files()
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if _is_known(file))
    if not remote.is_url(source) and not path.is_file():
        raise UpcyclingError(f"no file {source}; expected documents")
    if not _is_known(path_of(source)):
        kinds = ", ".join([*LINES, *(f".jsonl{end}" for end in COMPRESSED), PARQUET])
        raise UpcyclingError(f"{source}: expected one of {kinds}, or {HUB}NAME")
    return [source if remote.is_url(source) else str(path)]


def _is_known(path: PurePath) -> bool:
    plain = path.with_suffix("") if kind_of(str(path)) in COMPRESSED else path
    return plain.suffix.lower() in LINES or kind_of(str(path)) == PARQUET


def kind_of(source: str) -> str:
    """Return a file's last ending in small letters."""
    return path_of(source).suffix.lower()


def path_of(source: str) -> PurePath:
    """Return a file's path, also out of its URL; its endings say of what kind it is."""
    return PurePath(urlsplit(source).path if remote.is_url(source) else source)


def size_of(source: str) -> int:
    """Return a file's bytes."""
    return remote.size_of(source) if remote.is_url(source) else Path(source).stat().st_size


def open_file(source: str) -> BinaryIO:
    """Open a file."""
    return remote.open_url(source) if remote.is_url(source) else Path(source).open("rb")


def name_of(source: str) -> str:
    """Return what a dataset of a source is called: a file without its kind, the last of others."""
    if remote.is_url(source):
        source = urlsplit(source).path
    name = PurePath(source.partition("?")[0].replace("://", "/")).name.rstrip(":")
    for kind in (*COMPRESSED, *LINES, PARQUET):
        if name.lower().endswith(kind):
            name = name[: -len(kind)]
    return name


def resolved(source: str, home: Path) -> str:
    """Return a source that a file in `home` names: relative paths are relative to that."""
    if source.startswith(HUB) or remote.is_url(source):
        return source
    if source.startswith(redpajama.SCHEME):
        base, mark, options = source.removeprefix(redpajama.SCHEME).partition("?")
        return f"{redpajama.SCHEME}{base and resolved(base, home)}{mark}{options}"
    return str(home / Path(source).expanduser())
