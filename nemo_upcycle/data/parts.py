"""Tokenize a part of a corpus: tokens, document lengths and a record of the outcome."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nemo_upcycle.data.decontamination import EvaluationItems
from nemo_upcycle.data.documents import Document, Part, read_part
from nemo_upcycle.data.encoder import Encoder
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.files import write_whole

# A batch keeps all cores of the tokenizer busy and still fits easily into memory.
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 4_000_000

Advance = Callable[[int, int], None]
"""Called with the increments of bytes read and tokens written."""


@dataclass(frozen=True)
class Malformed:
    """A line or row that is not a document.

    Attributes:
        line: Index in the part, from 0.
        byte: Offset of the line's first byte in the file; None for a row.
        error: Why the line or row is not a document.
    """

    line: int
    byte: int | None
    error: str


@dataclass(frozen=True)
class Contaminated:
    """A document that was left out because it shares words with an evaluation item.

    Attributes:
        line: Index in the part, from 0.
        byte: Offset of the line's first byte in the file; None for a row.
        task: Name of the evaluation task.
        number: Index of the item in the task.
        words: The shared words.
    """

    line: int
    byte: int | None
    task: str
    number: int
    words: str


@dataclass(frozen=True)
class PartRecord:
    """The outcome of a part.

    Attributes:
        part: The part.
        documents: Number of documents written.
        tokens: Number of tokens written, including one end-of-document token per document.
        empty: Number of documents without a token, left out as in Megatron's own tool.
        left_out: Number of records that the selection excludes.
        malformed: Lines or rows that are not documents.
        contaminated: Documents that share words with an evaluation item.
        sha256: Checksum of the tokens' bytes.
        spelled: Number of special tokens spelled out in texts.
        largest_id: Largest token id written.
    """

    part: Part
    documents: int
    tokens: int
    empty: int
    left_out: int
    malformed: tuple[Malformed, ...]
    contaminated: tuple[Contaminated, ...]
    sha256: str
    spelled: int
    largest_id: int

    @property
    def lines(self) -> int:
        """Number of lines or rows in the part."""
        refused = len(self.malformed) + len(self.contaminated)
        return self.documents + self.empty + self.left_out + refused


@dataclass(frozen=True)
class PartFiles:
    """The files of a part. The record is written last and marks the part as complete."""

    directory: Path
    number: int

    @property
    def tokens(self) -> Path:
        """File of the tokens, one document after another."""
        return self.directory / f"{self.number:06}.bin"

    @property
    def lengths(self) -> Path:
        """File of the number of tokens per document, int32."""
        return self.directory / f"{self.number:06}.lengths"

    @property
    def record(self) -> Path:
        """File of the `PartRecord`, as JSON."""
        return self.directory / f"{self.number:06}.json"

    def is_complete(self, part: Part) -> bool:
        """Return whether the files are complete and belong to the part."""
        record = self.read_record()
        return record is not None and record.part == part

    def read_record(self) -> PartRecord | None:
        """Return the record; None if the part is incomplete."""
        if not self.record.is_file():
            return None
        values = json.loads(self.record.read_text())
        values["part"] = Part(**values["part"])
        for name, kind in (("malformed", Malformed), ("contaminated", Contaminated)):
            values[name] = tuple(kind(**each) for each in values[name])
        return PartRecord(**values)


def tokenize_part(
    part: Part,
    files: PartFiles,
    selection: Selection,
    encoder: Encoder,
    advance: Advance,
    evaluations: EvaluationItems | None = None,
) -> PartRecord:
    """Tokenize a part and write the files, without documents that overlap an evaluation item.

    Each document is the tokens of the text, without added special tokens, followed by eos.

    Args:
        part: The part.
        files: Files to write.
        selection: Which records are documents, and which part of a record is the text.
        encoder: Encoder from texts to tokens.
        advance: Called with the increments of bytes read and tokens written.
        evaluations: Evaluation items; None skips the overlap check.

    Raises:
        UpcyclingError: The source cannot be read to the end.
    """
    lengths: list[int] = []
    sha256, empty, spelled, largest = hashlib.sha256(), 0, 0, 0
    outcome = _Found(evaluations)
    # Named after the process: another process may still write the same part, with the same result.
    new = files.tokens.with_suffix(f".{os.getpid()}.partial")
    try:
        with new.open("wb") as out:
            for texts, read in _batches(outcome.texts(read_part(part, selection))):
                count = len(lengths)
                spelled += encoder.spelled(texts)
                for tokens in encoder.tokens(texts):
                    if not tokens:
                        empty += 1
                        continue
                    ids = np.array([*tokens, encoder.eos], encoder.dtype)
                    largest = max(largest, int(ids.max()))
                    document = ids.tobytes()
                    sha256.update(document)
                    out.write(document)
                    lengths.append(len(tokens) + 1)
                advance(read, sum(lengths[count:]))
        os.replace(new, files.tokens)
    finally:
        new.unlink(missing_ok=True)
    write_whole(files.lengths, np.array(lengths, np.int32).tobytes())
    record = PartRecord(
        part,
        documents=len(lengths),
        tokens=sum(lengths),
        empty=empty,
        left_out=outcome.left_out,
        malformed=tuple(outcome.malformed),
        contaminated=tuple(outcome.contaminated),
        sha256=sha256.hexdigest(),
        spelled=spelled,
        largest_id=largest,
    )
    write_whole(files.record, json.dumps(asdict(record)).encode())
    return record


class _Found:
    """A filter that passes texts on and records everything else."""

    def __init__(self, evaluations: EvaluationItems | None) -> None:
        self.evaluations = evaluations
        self.malformed: list[Malformed] = []
        self.contaminated: list[Contaminated] = []
        self.left_out = 0

    def texts(self, documents: Iterable[Document]) -> Iterator[tuple[str, int]]:
        for line, document in enumerate(documents):
            text, byte = document.text, document.byte
            if document.error is not None:
                self.malformed.append(Malformed(line, byte, document.error))
            elif text is None:
                self.left_out += 1
            elif self.evaluations and (overlap := self.evaluations.overlap(text)):
                self.contaminated.append(Contaminated(line, byte, **vars(overlap)))
            else:
                yield text, document.done


def _batches(texts: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], int]]:
    """Group texts into batches; yield each batch with the bytes read since the previous batch."""
    batch: list[str] = []
    characters = end = before = 0
    for text, end in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch, end - before
            batch, characters, before = [], 0, end
    if batch:
        yield batch, end - before
