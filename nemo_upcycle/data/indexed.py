"""Tokenises JSONL documents to Megatron's indexed dataset, a `.bin` and `.idx` pair."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.data.tokenizer import read_documents
from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A batch keeps all cores of the tokenizer busy and still fits easily in memory.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class IndexedDatasetStats:
    """What `build_indexed_dataset` wrote.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, one end-of-document token for each document included.
        bytes_read: Size of the JSONL file in bytes.
        prefix: Path of the dataset without `.bin` and `.idx`, as Megatron takes it.
    """

    documents: int
    tokens: int
    bytes_read: int
    prefix: Path


def build_indexed_dataset(
    jsonl: Path,
    tokenizer_dir: Path,
    out_prefix: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> IndexedDatasetStats:
    """Writes the documents' tokens to `out_prefix` + `.bin` and `.idx`, replacing older ones.

    Each document is its text's tokens without special tokens, then one end-of-document token
    (the tokenizer's eos). Documents with an empty text are left out, as Megatron's own tool does.
    The `.idx` appears last: where it is, the dataset is complete.

    Args:
        jsonl: UTF-8 file, each line an object with a string under "text".
        tokenizer_dir: Hugging Face tokenizer directory.
        out_prefix: Path of the dataset without `.bin` and `.idx`.
        progress: Called with (bytes done, bytes in total) after each batch of documents.

    Raises:
        UpcyclingError: If the JSONL file or the tokenizer directory is missing, a line is
            malformed (names file and line), there is no document with text, or the tokenizer has
            no eos token. Nothing is left behind.
    """
    from megatron.core.datasets.indexed_dataset import (
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )

    total = jsonl.stat().st_size if jsonl.is_file() else 0  # its absence is told on reading
    tokenizer = _load_tokenizer(tokenizer_dir)
    out_prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_prefix.parent, prefix=".indexed-") as temporary:
        new = str(Path(temporary, "new"))
        builder = IndexedDatasetBuilder(get_bin_path(new), dtype=_token_dtype(tokenizer))
        try:
            for batch, done in _batches(read_documents(jsonl)):
                _add_documents(builder, tokenizer, batch)
                if progress is not None:
                    progress(done, total)
        finally:
            builder.data_file.close()
        if not builder.sequence_lengths:
            raise UpcyclingError(f"{jsonl}: no document with text in it")
        builder.finalize(get_idx_path(new))
        # Never an index beside tokens that are not its own, not even for a moment.
        Path(get_idx_path(str(out_prefix))).unlink(missing_ok=True)
        os.replace(get_bin_path(new), get_bin_path(str(out_prefix)))
        os.replace(get_idx_path(new), get_idx_path(str(out_prefix)))
    lengths = builder.sequence_lengths
    return IndexedDatasetStats(len(lengths), sum(lengths), total, out_prefix)


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer from disk and makes sure that it can end a document."""
    import transformers

    auto_tokenizer: Any = transformers.AutoTokenizer  # has no type annotations
    if not directory.is_dir():  # otherwise taken for the name of a model on the Hub
        raise UpcyclingError(f"no tokenizer directory at {directory}")
    tokenizer: PreTrainedTokenizerBase = auto_tokenizer.from_pretrained(
        str(directory), use_fast=True, local_files_only=True
    )
    if tokenizer.eos_token_id is None:
        raise UpcyclingError(
            f"the tokenizer in {directory} has no eos token, and every document needs one at its "
            'end; set "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def _token_dtype(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns the NumPy type that Megatron uses for this vocabulary."""
    from megatron.core.datasets.indexed_dataset import DType

    # The largest id and not the number of tokens: added tokens may leave gaps.
    return DType.optimal_dtype(max(tokenizer.get_vocab().values()) + 1)


def _batches(documents: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], int]]:
    """Groups (text, end in bytes) to (texts, end of the last in bytes)."""
    batch: list[str] = []
    characters = end = 0
    for text, end in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch, end
            batch, characters = [], 0
    if batch:
        yield batch, end


def _add_documents(builder: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Tokenises the texts and appends each, with its end-of-document token, to the dataset."""
    # verbose: a document longer than the model's context is no reason for a warning here.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    for tokens in encoded["input_ids"]:
        if tokens:
            document = [*tokens, tokenizer.eos_token_id]
            builder.add_document(document, [len(document)])
