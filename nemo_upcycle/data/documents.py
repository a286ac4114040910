"""Documents to read: JSON lines (plain, .gz, .zst), Parquet, Hugging Face data sets; in parts.

A part is small enough to be done again, and the same wherever and whenever it is read. Nothing is
passed over silently: what is no document comes out as one with an error, and where it is.
"""

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

from nemo_upcycle.errors import UpcyclingError

LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
HUB = "hf://"


@dataclass(frozen=True)
class Part:
    """A piece of a source.

    Attributes:
        source: A file, or `hf://NAME?config=…&split=…`.
        start: First byte of a plain file, row group of a Parquet file, shard of a data set.
        stop: Where it ends; a line belongs to the part that its first byte is in.
        bytes: Its size, to show progress by.
    """

    source: str
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class Document:
    """What a line or a row holds.

    Attributes:
        text: The text, empty for an empty line; None where there is none.
        error: Why there is none; None where it was left out as was asked for.
        byte: The line's first in the (unpacked) file; None for a row.
        done: Bytes of the part that were read by now.
    """

    text: str | None
    error: str | None
    byte: int | None
    done: int


@dataclass(frozen=True)
class Selection:
    """What of a record is a document.

    Attributes:
        text_key: The field with the text.
        where: Fields that must have these values, as text; other records are left out.
        template: A prompt format in Jinja over the record's fields, instead of `text_key`.
    """

    text_key: str = "text"
    where: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None

    @property
    def columns(self) -> list[str] | None:
        """The fields that are read; None: all of them."""
        return None if self.template else [self.text_key, *self.where]

    def of(self, record: Any) -> tuple[str | None, str | None]:
        """Return a record's text, or why it has none; neither where it is left out."""
        if not isinstance(record, dict):
            return None, f"expected an object, found {type(record).__name__}"
        for key, value in self.where.items():
            if key not in record:
                return None, f'no "{key}"'
            if str(record[key]) != value:
                return None, None
        if self.template is not None:
            text, error = _rendered(self.template, record)
            if error:
                return None, error
        else:
            text = record.get(self.text_key)
        if not isinstance(text, str):
            return None, f'expected a string under "{self.text_key}"'
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # a lone \ud800 escape, which tokenizers refuse
            return None, f"not valid Unicode: {error}"
        return text, None


@cache
def _compiled(template: str) -> Any:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template)
    except TemplateError as error:
        raise UpcyclingError(f"template {template!r}: {error}") from None


def _rendered(template: str, record: dict[str, Any]) -> tuple[str | None, str | None]:
    compiled = _compiled(template)
    try:
        return compiled.render(record), None
    except Exception as error:  # a template may do anything to a record
        return None, f"the template does not fit: {type(error).__name__}: {error}"


def files_of(sources: Iterable[str]) -> list[str]:
    """Return the sources with directories replaced by the files in them, by name.

    Raises:
        UpcyclingError: One is not there, is of no kind that is known, or there is none.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        if source.startswith(HUB):
            found.append(source)
        elif path.is_dir():
            found += sorted(str(file) for file in path.rglob("*") if _is_known(file))
        elif not path.is_file():
            raise UpcyclingError(f"no file {source}; expected documents")
        elif not _is_known(path):
            kinds = ", ".join([*LINES, *(f".jsonl{end}" for end in COMPRESSED), PARQUET])
            raise UpcyclingError(f"{source}: expected one of {kinds}, or {HUB}NAME")
        else:
            found.append(str(path))
    if not found:
        raise UpcyclingError(f"no documents in {', '.join(sources)}")
    return found


def _is_known(path: Path) -> bool:
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    return plain.suffix in LINES or path.suffix == PARQUET


def parts_of(source: str, part_bytes: int) -> list[Part]:
    """Cut a source into parts.

    Args:
        source: A file or a data set.
        part_bytes: About how large they are; a compressed file is one whatever its size.

    Raises:
        UpcyclingError: It cannot be read.
    """
    if source.startswith(HUB):
        return [Part(source, shard, shard + 1, 1) for shard in range(_data_set(source).num_shards)]
    path = Path(source)
    if path.suffix == PARQUET:
        return list(_row_groups(source, part_bytes))
    size = path.stat().st_size
    if path.suffix in COMPRESSED:
        return [Part(source, 0, size, size)]
    count = max(1, -(-size // part_bytes))
    cuts = [size * number // count for number in range(count + 1)]
    return [Part(source, *cut, cut[1] - cut[0]) for cut in pairwise(cuts)]


def read_part(part: Part, selection: Selection) -> Iterator[Document]:
    """Yield what a part holds.

    Raises:
        UpcyclingError: The file cannot be read to its end.
    """
    path = Path(part.source)
    try:
        if part.source.startswith(HUB):
            yield from _read_data_set(part, selection)
        elif path.suffix == PARQUET:
            yield from _read_parquet(part, selection)
        else:
            yield from _read_lines(part, selection)
    except (OSError, EOFError) as error:
        raise UpcyclingError(f"{part.source}: cannot be read to its end: {error}") from error


# --- JSON lines ----------------------------------------------------------------------------------


def _read_lines(part: Part, selection: Selection) -> Iterator[Document]:
    with Path(part.source).open("rb") as file:
        lines, compressed = _unpacked(file, part)
        at = part.start
        if at and not compressed:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # the rest of a line that began before
        while compressed or at < part.stop:
            line = lines.readline()
            if not line:
                return
            read = file.tell() if compressed else at + len(line) - part.start
            yield Document(*_parsed(line, selection), at, min(read, part.bytes))
            at += len(line)


def _unpacked(file: BinaryIO, part: Part) -> tuple[BinaryIO, bool]:
    if part.source.endswith(".gz"):
        return gzip.open(file), True  # type: ignore[return-value]
    if part.source.endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        return io.BufferedReader(stream, 2**20), True
    return file, False


def _parsed(line: bytes, selection: Selection) -> tuple[str | None, str | None]:
    if not line.strip():
        return "", None
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        return None, f"not a line of JSON in UTF-8: {error}"
    return selection.of(record)


# --- Parquet -------------------------------------------------------------------------------------


def _parquet(source: str) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(source)
    except pyarrow.ArrowException as error:
        raise UpcyclingError(f"{source}: not a Parquet file: {error}") from error


def _row_groups(source: str, part_bytes: int) -> Iterator[Part]:
    """Yield row groups, several together where they are small."""
    metadata = _parquet(source).metadata
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= part_bytes or group == metadata.num_row_groups - 1:
            yield Part(source, start, group + 1, size)
            start, size = group + 1, 0


def _read_parquet(part: Part, selection: Selection) -> Iterator[Document]:
    file = _parquet(part.source)
    columns = selection.columns
    missing = [name for name in columns or () if name not in file.schema_arrow.names]
    if missing:
        raise UpcyclingError(
            f'{part.source}: no column "{missing[0]}"; it has {", ".join(file.schema_arrow.names)}.'
        )
    groups = list(range(part.start, part.stop))
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    read = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
        for record in batch.to_pylist():
            read += 1
            yield Document(*selection.of(record), None, part.bytes * read // rows)


# --- Hugging Face data sets ----------------------------------------------------------------------


def _data_set(source: str) -> Any:
    """Open a data set to be streamed: `hf://NAME`, with `?config=…&split=…`.

    `NAME` is the hub's or a directory's; the split is `train` unless it is said.
    """
    from datasets import load_dataset

    name, _, query = source.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - {"config", "split", "revision"})
    if unknown:
        raise UpcyclingError(
            f"{source}: no option {unknown[0]!r}; expected config, split, revision"
        )
    try:
        return load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UpcyclingError(f"{source}: cannot be opened: {error}") from error


def _read_data_set(part: Part, selection: Selection) -> Iterator[Document]:
    whole = _data_set(part.source)
    for record in whole.shard(whole.num_shards, part.start):
        yield Document(*selection.of(record), None, 0)
