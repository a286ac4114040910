"""Read documents from JSON lines (plain, .gz, .zst), Parquet files and Hugging Face datasets.

A file behind a URL is streamed, and nothing is stored. Sources are read in parts. A part is small
enough to be read again, and has the same contents on every machine at any time. Nothing is skipped
silently: a record that is not a document is returned with an error and a position.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

from nemo_upcycle.data.remote import is_url
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.data.sources import COMPRESSED, HUB, PARQUET, kind_of, open_file, size_of
from nemo_upcycle.errors import UpcyclingError


@dataclass(frozen=True)
class Part:
    """A part of a source.

    Attributes:
        source: A file, the URL of a file, or `hf://NAME?config=…&split=…`.
        start: First byte of a plain file, row group of a Parquet file, or shard of a dataset.
        stop: End (exclusive). A line belongs to the part that contains the line's first byte.
        bytes: Size in bytes, for the progress display.
    """

    source: str
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class Document:
    """The contents of a line or row.

    Attributes:
        text: The text, empty for an empty line; None for a record without text.
        error: Why there is no text; None if there is text or the selection excludes the record.
        byte: Offset of the line's first byte in the (uncompressed) file; None for a row.
        done: Bytes of the part read so far.
    """

    text: str | None
    error: str | None
    byte: int | None
    done: int


def parts_of(source: str, part_bytes: int) -> list[Part]:
    """Split a source into parts.

    Args:
        source: A file or a dataset.
        part_bytes: Approximate size of a part. A compressed file is one part whatever its size.

    Raises:
        UpcyclingError: The source cannot be read.
    """
    if source.startswith(HUB):
        return [Part(source, shard, shard + 1, 1) for shard in range(_data_set(source).num_shards)]
    kind = kind_of(source)
    if kind == PARQUET:
        return list(_row_groups(source, part_bytes))
    size = size_of(source)
    if kind in COMPRESSED:
        return [Part(source, 0, size, size)]
    count = max(1, -(-size // part_bytes))
    cuts = [size * number // count for number in range(count + 1)]
    return [Part(source, *cut, cut[1] - cut[0]) for cut in pairwise(cuts)]


def read_part(part: Part, selection: Selection) -> Iterator[Document]:
    """Yield the documents of a part.

    Raises:
        UpcyclingError: The source cannot be read to the end.
    """
    try:
        if part.source.startswith(HUB):
            yield from _read_data_set(part, selection)
        elif kind_of(part.source) == PARQUET:
            yield from _read_parquet(part, selection)
        else:
            yield from _read_lines(part, selection)
    except (OSError, EOFError, zlib.error) as error:
        raise UpcyclingError(f"{part.source}: cannot be read to its end: {error}") from error


# --- JSON lines ----------------------------------------------------------------------------------


def _read_lines(part: Part, selection: Selection) -> Iterator[Document]:
    with open_file(part.source) as file:
        lines, compressed = _unpacked(file, part)
        at = part.start
        if at and not compressed:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # skip the rest of the previous part's last line
        number = 0
        while compressed or at < part.stop:
            try:
                line = lines.readline()
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise OSError(f"after {number} lines, at byte {at}: {error}") from error
            number += 1
            if not line:
                return
            read = file.tell() if compressed else at + len(line) - part.start
            yield Document(*_parsed(line, selection), at, min(read, part.bytes))
            at += len(line)


def _unpacked(file: BinaryIO, part: Part) -> tuple[BinaryIO, bool]:
    kind = kind_of(part.source)
    if kind == ".gz":
        return gzip.open(file), True  # type: ignore[return-value]
    if kind == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        return io.BufferedReader(stream, 2**20), True
    return file, False


def parse_line(line: bytes) -> Any:
    """Return the record on a line of JSON.

    Raises:
        ValueError: The line is not valid JSON in UTF-8; the message says why.
    """
    try:
        # A byte order mark starts a file, and occurs inside files that were concatenated.
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except RecursionError:
        raise ValueError("not a line of JSON that Python reads: too deeply nested") from None
    except ValueError as error:  # invalid JSON or invalid UTF-8
        raise ValueError(f"not a line of JSON in UTF-8: {error}{_hint(line)}") from None


def _hint(line: bytes) -> str:
    """Return a remedy for a JSON document that spans several lines, or for UTF-16."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return " (it is UTF-16: iconv -f UTF-16 -t UTF-8 FILE)"
    begun = {
        b"[": "an array over several lines: jq -c '.[]' FILE writes one per line",
        b"{": "an object over several lines: jq -c . FILE writes one per line",
    }
    begins = line.removeprefix(codecs.BOM_UTF8).strip()
    return f" ({begun[begins]})" if begins in begun else ""


def is_blank(line: bytes) -> bool:
    """Return whether a line is blank."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def _parsed(line: bytes, selection: Selection) -> tuple[str | None, str | None]:
    if is_blank(line):
        return "", None
    try:
        record = parse_line(line)
    except ValueError as error:
        return None, str(error)
    return selection.of(record)


# --- Parquet -------------------------------------------------------------------------------------


def _parquet(source: str) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(open_file(source) if is_url(source) else source)
    except pyarrow.ArrowException as error:
        raise UpcyclingError(f"{source}: not a Parquet file: {error}") from error


def _row_groups(source: str, part_bytes: int) -> Iterator[Part]:
    """Yield parts of one or several row groups, so that small row groups share a part."""
    metadata = _parquet(source).metadata
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= part_bytes or group == metadata.num_row_groups - 1:
            yield Part(source, start, group + 1, size)
            start, size = group + 1, 0


def _read_parquet(part: Part, selection: Selection) -> Iterator[Document]:
    file = _parquet(part.source)
    names = file.schema_arrow.names
    columns = selection.columns_of(names)
    missing = [name for name in columns or () if name not in names]
    if missing:
        raise UpcyclingError(
            f'{part.source}: no column "{missing[0]}"; it has {", ".join(names)}: say which with '
            "--text-key."
        )
    groups = list(range(part.start, part.stop))
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    read = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
        for record in batch.to_pylist():
            read += 1
            yield Document(*selection.of(record), None, part.bytes * read // rows)


# --- Hugging Face data sets ----------------------------------------------------------------------


@cache
def _data_set(source: str) -> Any:
    """Open a dataset for streaming: `hf://NAME`, with `?config=…&split=…`.

    `NAME` is a name on the hub or a directory; the default split is `train`.
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
        raise UpcyclingError(
            f"{source}: cannot be opened: {error}. Where the hub cannot be reached: hf download "
            f"--repo-type dataset {name} --local-dir DIR on a machine that does, and {HUB}DIR here."
        ) from error


def _read_data_set(part: Part, selection: Selection) -> Iterator[Document]:
    whole = _data_set(part.source)
    for record in whole.shard(whole.num_shards, part.start):
        yield Document(*selection.of(record), None, 0)
