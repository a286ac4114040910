"""Make Megatron's indexed dataset from documents, in parallel and resumable after a kill.

The sources are split into parts. Processes tokenize the parts into a directory beside the dataset,
and a complete part is never tokenized again. The parts are then concatenated in order. The files
therefore depend neither on the number of processes nor on interruptions.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from nemo_upcycle.data.decontamination import EvaluationItems, read_items
from nemo_upcycle.data.documents import Part, parts_of
from nemo_upcycle.data.encoder import Encoder, load_encoder
from nemo_upcycle.data.manifest import (
    COPY_BYTES,
    Manifest,
    manifest_path,
    read_manifest,
    sha256_of,
)
from nemo_upcycle.data.parts import PartFiles, PartRecord, tokenize_part
from nemo_upcycle.data.remote import is_url
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.data.sources import HUB, files_of
from nemo_upcycle.data.workers import tokenize_parts
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable, output_directory
from nemo_upcycle.work_directory import work_directory

FORMAT = 2
REPORTS = ("malformed", "contaminated")
"""Kinds of refused records, listed in separate files beside the dataset."""

PART_BYTES = 16 * 2**20
SOURCES_AT_ONCE = 16

Progress = Callable[[int, int, int], None]
"""Called with bytes read, bytes in total, and tokens written in this run."""


@dataclass(frozen=True)
class Preparation:
    """Inputs and output of a dataset.

    Attributes:
        sources: Files, directories, URLs, `redpajama-v2://…`, or `hf://NAME?config=…&split=…`.
            Files are identified by name, size and time, other sources by name alone.
        tokenizer: The tokenizer's directory.
        prefix: Path of the dataset without `.bin` and `.idx`.
        selection: Which records are documents, and which part of a record is the text.
        evaluations: File of evaluation items; documents that overlap an item are left out.
        max_malformed: Maximum share of malformed lines.
        part_bytes: Approximate size of a part.
        parse_special: Encode the spelling of a special token as that token, instead of as text.
    """

    sources: tuple[str, ...]
    tokenizer: Path
    prefix: Path
    selection: Selection = field(default_factory=Selection)
    evaluations: Path | None = None
    max_malformed: float = 0.01
    part_bytes: int = PART_BYTES
    parse_special: bool = False

    def file(self, suffix: str) -> Path:
        """Return the path of the dataset's file with this suffix."""
        return self.prefix.with_name(self.prefix.name + suffix)

    @property
    def work(self) -> Path:
        """The directory of the parts."""
        return self.prefix.with_name(f".{self.prefix.name}.parts")


def prepare(
    preparation: Preparation, workers: int = 1, progress: Progress | None = None
) -> Manifest:
    """Make a dataset, or continue an interrupted preparation.

    The `.idx` file appears after the `.bin` file. The manifest appears last and marks the dataset
    as complete.

    Args:
        preparation: Inputs and output.
        workers: Number of processes; 1 uses this process, with the tokenizer's own threads.
        progress: Called with bytes read, bytes in total, and tokens written in this run.

    Returns:
        The manifest; immediately if the dataset is already complete.

    Raises:
        UpcyclingError: A source or the tokenizer is missing or unreadable, too many lines are
            malformed, or there is no document. Also if another process works on the dataset, or
            parts of another job are in the directory. Only complete parts are kept.
    """
    names = files_of(preparation.sources)
    encoder = load_encoder(preparation.tokenizer, preparation.parse_special)
    evaluations = read_items(preparation.evaluations) if preparation.evaluations else None
    job = _job(preparation, names, encoder)
    if (there := read_manifest(preparation.prefix)) is not None and there.job == job:
        _remove_parts(preparation)
        return there
    check_writable(preparation.prefix.parent)
    parts = _parts(names, preparation.part_bytes)
    try:
        with (
            output_directory(preparation.prefix.parent),
            work_directory(
                preparation.work, job, "parts", "other sources, sizes, tokenizer or options"
            ),
        ):
            records = _records(preparation, parts, (encoder, evaluations), workers, progress)
            _check(preparation, records)
            manifest = _put_together(preparation, job, records, encoder)
    except OSError as error:  # e.g. a full or lost disk
        raise UpcyclingError(
            f"{preparation.prefix} cannot be written: {error}. Parts that are complete are kept, "
            "and the same command goes on."
        ) from error
    _remove_parts(preparation)
    return manifest


# --- Parts ---------------------------------------------------------------------------------------


def _job(preparation: Preparation, names: Sequence[str], encoder: Encoder) -> dict[str, Any]:
    """Return everything that determines the dataset's contents."""
    return {
        "format": FORMAT,
        "sources": [_identity(name) for name in names],
        "tokenizer": encoder.fingerprint(),
        "eos": encoder.eos,
        "parse_special": preparation.parse_special,
        "text_key": preparation.selection.text_key,
        "where": dict(preparation.selection.where),
        "template": preparation.selection.template,
        "evaluations": preparation.evaluations and sha256_of(preparation.evaluations),
        "part_bytes": preparation.part_bytes,
    }


def _identity(source: str) -> dict[str, Any]:
    """Return the values that identify the current contents of a source."""
    if source.startswith(HUB) or is_url(source):
        return {"source": source}
    stat = Path(source).stat()
    return {"source": source, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _parts(names: Sequence[str], part_bytes: int) -> list[Part]:
    """Split the sources into parts; threads overlap the waiting times for servers."""
    with ThreadPoolExecutor(SOURCES_AT_ONCE) as pool:
        return list(chain.from_iterable(pool.map(lambda name: parts_of(name, part_bytes), names)))


def _remove_parts(preparation: Preparation) -> None:
    shutil.rmtree(preparation.work, ignore_errors=True)


def _records(
    preparation: Preparation,
    parts: Sequence[Part],
    tools: tuple[Encoder, EvaluationItems | None],
    workers: int,
    progress: Progress | None,
) -> list[PartRecord]:
    """Return the records of all parts, tokenizing the parts that are missing."""
    files = [PartFiles(preparation.work, number) for number in range(len(parts))]
    tasks = [task for task in zip(parts, files, strict=True) if not task[1].is_complete(task[0])]
    total = sum(part.bytes for part in parts)
    read, written = total - sum(part.bytes for part, _ in tasks), 0

    def advance(more_bytes: int, more_tokens: int) -> None:
        nonlocal read, written
        read, written = read + more_bytes, written + more_tokens
        if progress is not None:
            progress(min(read, total), total, written)

    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            tokenize_part(*task, preparation.selection, tools[0], advance, tools[1])
    else:
        given = preparation.selection, tools[0], workers
        tokenize_parts(tasks, *given, advance, preparation.evaluations)
    return [record for each in files if (record := each.read_record())]


def _check(preparation: Preparation, records: Sequence[PartRecord]) -> None:
    malformed = sum(len(record.malformed) for record in records)
    lines = sum(record.lines for record in records)
    if malformed > preparation.max_malformed * lines:
        first = next(_located(records, "malformed"))
        kept = f" What was read is kept in {preparation.work}, to go on from with another share."
        if not any(record.documents for record in records):
            _remove_parts(preparation)
            kept = ""
        raise UpcyclingError(
            f"{first['file']}:{first['line']}: {first['error']} ({malformed} of {lines} lines are "
            f"malformed, and at most {preparation.max_malformed:.2%} may be: --max-malformed)."
            f"{kept}"
        )
    if not any(record.documents for record in records):
        _remove_parts(preparation)
        names = ", ".join(preparation.sources)
        raise UpcyclingError(f"{names}: no document with text in it")


# --- The dataset ---------------------------------------------------------------------------------


def _put_together(
    preparation: Preparation, job: dict[str, Any], records: Sequence[PartRecord], encoder: Encoder
) -> Manifest:
    """Write the dataset's files atomically, the manifest last."""
    new = {suffix: preparation.work / f"new{suffix}" for suffix in (".bin", ".idx")}
    _write_dataset(preparation, records, encoder.dtype, new)
    for kind in REPORTS:
        if located := "".join(json.dumps(each) + "\n" for each in _located(records, kind)):
            new[f".{kind}.jsonl"] = preparation.work / f"new.{kind}.jsonl"
            new[f".{kind}.jsonl"].write_text(located)
    manifest = Manifest(
        documents=sum(record.documents for record in records),
        tokens=sum(record.tokens for record in records),
        empty=sum(record.empty for record in records),
        left_out=sum(record.left_out for record in records),
        malformed=sum(len(record.malformed) for record in records),
        contaminated=sum(len(record.contaminated) for record in records),
        dtype=encoder.dtype,
        job=job,
        sources=_of_sources(records),
        files={
            preparation.file(suffix).name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for suffix, path in new.items()
        },
        tokenizer={
            "fingerprint": job["tokenizer"],
            "eos": encoder.eos,
            "parse_special": preparation.parse_special,
        },
        spelled=sum(record.spelled for record in records),
        largest_id=max(record.largest_id for record in records),
    )
    # At no moment may an index or manifest lie beside tokens of a different dataset.
    manifest_path(preparation.prefix).unlink(missing_ok=True)
    for suffix in (".idx", *(f".{kind}.jsonl" for kind in REPORTS)):
        preparation.file(suffix).unlink(missing_ok=True)
    for suffix, path in new.items():
        os.replace(path, preparation.file(suffix))
    written = preparation.work / "new.manifest.json"
    written.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    os.replace(written, manifest_path(preparation.prefix))
    return manifest


def _write_dataset(
    preparation: Preparation, records: Sequence[PartRecord], dtype: str, new: dict[str, Path]
) -> None:
    """Concatenate the parts with Megatron's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(new[".bin"]), dtype=getattr(np, dtype))
    try:
        for number, record in enumerate(records):
            files = PartFiles(preparation.work, number)
            sha256 = hashlib.sha256()
            with files.tokens.open("rb") as tokens:
                while chunk := tokens.read(COPY_BYTES):
                    sha256.update(chunk)
                    builder.data_file.write(chunk)
            if sha256.hexdigest() != record.sha256:
                files.record.unlink()
                raise UpcyclingError(
                    f"{files.tokens} is not what was written: it was damaged. Run the same command "
                    "again: this part is made anew."
                )
            builder.sequence_lengths.extend(np.fromfile(files.lengths, np.int32).tolist())
    finally:
        builder.data_file.close()
    builder.document_indices = list(range(len(builder.sequence_lengths) + 1))
    builder.finalize(str(new[".idx"]))


def _located(records: Sequence[PartRecord], kind: str) -> Iterator[dict[str, Any]]:
    """Yield a report per malformed or contaminated record: file, line from 1, byte, reason."""
    for source, group in groupby(records, key=lambda record: record.part.source):
        before = 1
        for record in group:
            for each in getattr(record, kind):
                values = {"file": source, **vars(each), "line": before + each.line}
                yield {name: value for name, value in values.items() if value is not None}
            before += record.lines


def _of_sources(records: Sequence[PartRecord]) -> list[dict[str, Any]]:
    manifests = []
    for source, group in groupby(records, key=lambda record: record.part.source):
        of_source = list(group)
        manifests.append(
            {
                "source": source,
                "documents": sum(record.documents for record in of_source),
                "tokens": sum(record.tokens for record in of_source),
                "empty": sum(record.empty for record in of_source),
                "left_out": sum(record.left_out for record in of_source),
                "malformed": sum(len(record.malformed) for record in of_source),
                "contaminated": sum(len(record.contaminated) for record in of_source),
            }
        )
    return manifests
