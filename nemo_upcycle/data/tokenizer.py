"""Train a byte-level BPE tokenizer on JSONL documents, and read such documents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.data.documents import is_blank, parse_line
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.data.sources import check_is_lines
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable, scratch_directory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"

_SPECIAL_TOKENS = [BOS_TOKEN, EOS_TOKEN]
# Byte-level BPE starts from all 256 bytes, so that the vocabulary can spell any text.
_MIN_VOCAB_SIZE = 256 + len(_SPECIAL_TOKENS)


def train_tokenizer(files: Sequence[Path], out: Path, vocab_size: int = 4096) -> int:
    """Train a byte-level BPE on the files' "text" and save a Hugging Face tokenizer directory.

    The tokenizer loads with `transformers.AutoTokenizer.from_pretrained(out)`. It adds no special
    tokens, and decoding gives every text back unchanged. The same files give the same tokenizer.

    Args:
        files: JSONL files, each line an object with a string under "text".
        out: Output directory; an existing tokenizer is replaced.
        vocab_size: Vocabulary size in tokens, including `<s>` (id 0) and `</s>` (id 1).

    Returns:
        The vocabulary size in tokens.

    Raises:
        UpcyclingError: The vocabulary is smaller than 256 bytes and two special tokens, or the
            corpus is too small for the vocabulary. Also if a file is missing, a line is malformed,
            or `out` contains something other than a tokenizer.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UpcyclingError(
            f"vocab_size is {vocab_size}, but a byte-level BPE needs at least {_MIN_VOCAB_SIZE} "
            f"(256 bytes and {len(_SPECIAL_TOKENS)} special tokens)"
        )
    _check_replaceable(out)
    check_writable(out.parent)
    tokenizer = _train_bpe(files, vocab_size)
    reached: int = tokenizer.get_vocab_size()
    if reached < vocab_size:
        names = ", ".join(str(file) for file in files)
        raise UpcyclingError(
            f"the corpus is too small: {names} gave {reached} tokens, vocab_size is {vocab_size}; "
            "give more text or a smaller vocab_size"
        )
    _save(tokenizer, out)
    return reached


def read_documents(jsonl: Path) -> Iterator[tuple[str, int]]:
    """Yield (text, byte offset of the end of the line) for every document.

    Blank lines are skipped.

    Args:
        jsonl: UTF-8 file, each line an object with a string under "text".

    Raises:
        UpcyclingError: The file is missing, or a line is not such an object; the message names
            file and line number.
    """
    if not jsonl.is_file():
        raise UpcyclingError(f"no file {jsonl}; expected a JSONL file of documents")
    check_is_lines(jsonl)
    end = 0
    with jsonl.open("rb") as file:  # binary: byte offsets, and `\n` as the only line end
        for number, line in enumerate(file, start=1):
            end += len(line)
            if not is_blank(line):
                yield _parse_document(line, f"{jsonl}:{number}"), end


def _parse_document(line: bytes, where: str) -> str:
    """Return the text of a JSONL line; error messages begin with `where`."""
    try:
        text, error = Selection().of(parse_line(line))
    except ValueError as failed:
        text, error = None, str(failed)
    if text is None:
        raise UpcyclingError(f"{where}: {error}")
    return text


def _train_bpe(files: Sequence[Path], vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for file in files for text, _ in read_documents(file))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the Hugging Face directory atomically."""
    import transformers

    tokenizer_class: Any = transformers.PreTrainedTokenizerFast  # the class has no type annotations
    fast = tokenizer_class(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,  # would remove the space in "a , b"
        model_input_names=["input_ids", "attention_mask"],  # Llama refuses token_type_ids
    )
    with scratch_directory(out.parent, out.name) as temporary:
        new = temporary / "new"
        fast.save_pretrained(str(new))
        if out.exists():  # a non-empty directory cannot be renamed over
            os.replace(out, temporary / "old")
        os.replace(new, out)


def _check_replaceable(out: Path) -> None:
    """Check that `out` is missing, an empty directory or an existing tokenizer.

    Raises:
        UpcyclingError: `out` is something else, which must not be replaced.
    """
    if not out.exists() or (out / "tokenizer.json").is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise UpcyclingError(
            f"{out} is there and is not a tokenizer directory; it is left alone: choose another "
            "directory or remove it"
        )
