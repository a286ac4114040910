"""The text of a calibration as sequences of tokens, in an order that nothing else decides."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_upcycle.checkpoint.tokenizer_files import load_tokenizer
from nemo_upcycle.data.checks import Dataset, TokenizerCheck
from nemo_upcycle.data.documents import parts_of, read_part
from nemo_upcycle.data.encoder import Encoder
from nemo_upcycle.data.paths import DataPath
from nemo_upcycle.data.preparation import PART_BYTES
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.data.sources import files_of
from nemo_upcycle.errors import UpcyclingError

Tokens = npt.NDArray[np.int32]

TOKENIZED = ".bin"
"""End of a source's name that is tokenized data."""

_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Source:
    """Text of one kind: documents joined, then cut into sequences.

    Attributes:
        name: The name of the file or directory, without the path.
        sequences: The tokens; only the last sequence may be shorter than the others.
    """

    name: str
    sequences: tuple[Tokens, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.sequences))

    @property
    def described(self) -> dict[str, Any]:
        """What identifies the text: name, number of tokens, and a digest of the tokens."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(sequence.tobytes())
        return {"name": self.name, "tokens": self.tokens, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Prompts:
    """Texts that an expert is meant for, and texts that it is not meant for."""

    positive: tuple[Tokens, ...]
    negative: tuple[Tokens, ...]

    @property
    def digest(self) -> str:
        """A digest of the tokens."""
        lists = [[each.tolist() for each in kind] for kind in (self.positive, self.negative)]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()


def read_sources(
    names: Sequence[str], tokens: int, encoder: Encoder, length: int, text_key: str = "text"
) -> list[Source]:
    """Read the first documents of each source, with an equal share of the tokens each.

    Args:
        names: Files, directories or datasets, as `data tokenize` takes them; or the `.bin` file of
            tokenized data, see `check_tokenizer`.
        tokens: Tokens in all; a source with less text gives what it has.
        encoder: Encoder from texts to tokens. A document ends with its eos token.
        length: Tokens per sequence.
        text_key: Field of a document's record with the text.

    Raises:
        UpcyclingError: A source cannot be read or holds no text, or a record is malformed.
    """
    share = max(1, tokens // len(names))
    return [_read(name, share, encoder, length, Selection(text_key)) for name in names]


def check_tokenizer(names: Sequence[str], directory: Path) -> None:
    """Check that the tokenized data among the sources were made with a tokenizer.

    Args:
        names: See `read_sources`.
        directory: The tokenizer's directory.

    Raises:
        UpcyclingError: As of `TokenizerCheck`; or a dataset is damaged or missing.
    """
    if tokenized := [name for name in names if name.endswith(TOKENIZED)]:
        check = TokenizerCheck(load_tokenizer(directory))
        for name in tokenized:
            check.check(_dataset(name))


def _read(name: str, tokens: int, encoder: Encoder, length: int, selection: Selection) -> Source:
    tokenized = name.endswith(TOKENIZED)
    documents = _tokenized(name) if tokenized else _documents(name, encoder, selection)
    stream = np.fromiter(
        itertools.islice(itertools.chain.from_iterable(documents), tokens), np.int32
    )
    if not len(stream):
        raise UpcyclingError(f"{name}: no document with text in it.")
    cuts = range(length, len(stream), length)
    return Source(PurePath(name.rstrip("/")).name, tuple(np.split(stream, cuts)))


def _documents(name: str, encoder: Encoder, selection: Selection) -> Iterator[list[int]]:
    """Yield each document's tokens and eos; documents without a token are left out."""
    texts = _texts(name, selection)
    while some := list(itertools.islice(texts, _DOCUMENTS_AT_ONCE)):
        for tokens in encoder.tokens(some):
            if tokens:
                yield [*tokens, encoder.eos]


def _tokenized(name: str) -> Iterator[npt.NDArray[Any]]:
    """Yield each document's tokens and eos from Megatron's files."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(_dataset(name).prefix)
    yield from (documents[number] for number in range(len(documents)))


def _dataset(name: str) -> Dataset:
    return Dataset(DataPath(name.removesuffix(TOKENIZED)))


def _texts(name: str, selection: Selection) -> Iterator[str]:
    for file in files_of([name]):
        for part in parts_of(file, PART_BYTES):
            for document in read_part(part, selection):
                if document.error is not None:
                    where = "" if document.byte is None else f", at byte {document.byte}"
                    raise UpcyclingError(f"{file}{where}: {document.error}")
                if document.text:
                    yield document.text


def read_prompts(file: Path, encoder: Encoder) -> list[Prompts]:
    """Read the prompts of each expert.

    Args:
        file: A line of JSON per expert: `{"positive": ["…"], "negative": ["…"]}`; negative
            prompts may be left out.
        encoder: Encoder from texts to tokens.

    Raises:
        UpcyclingError: The file cannot be read, or a line is not such an object.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UpcyclingError(f"{file}: cannot be read: {error}") from error
    prompts = [
        _prompts(line, f"{file}:{number}", encoder)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise UpcyclingError(f"{file} is empty; expected a line of prompts per expert.")
    return prompts


def _prompts(line: str, where: str, encoder: Encoder) -> Prompts:
    try:
        record = json.loads(line)
        texts = {kind: record.get(kind, []) for kind in ("positive", "negative")}
        unknown = sorted(set(record) - set(texts))
        good = texts["positive"] and all(
            isinstance(each, list) and all(isinstance(text, str) and text for text in each)
            for each in texts.values()
        )
    except (ValueError, AttributeError):
        good, unknown = False, []
    if not good or unknown:
        raise UpcyclingError(
            f'{where}: expected the prompts of an expert, such as {{"positive": ["def main():"], '
            f'"negative": ["Once upon a time"]}}{f", found {unknown[0]!r}" if unknown else ""}.'
        )
    return Prompts(
        *(
            tuple(np.array(tokens, np.int32) for tokens in encoder.tokens(texts[kind]))
            for kind in ("positive", "negative")
        )
    )
