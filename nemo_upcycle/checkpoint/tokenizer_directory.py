"""Find the directory of a tokenizer that a user names."""

import hashlib
import os
import shutil
from pathlib import Path

from nemo_upcycle.checkpoint.gguf_file import gguf_in
from nemo_upcycle.checkpoint.huggingface import find_directory, is_huggingface, resolve_directory
from nemo_upcycle.checkpoint.megatron import find_layout
from nemo_upcycle.checkpoint.run_directory import resolve_trained
from nemo_upcycle.checkpoint.tokenizer_files import NEEDED, find_tokenizer, place_of
from nemo_upcycle.errors import UpcyclingError


def named_tokenizer(source: str | Path) -> Path:
    """Return the directory of the tokenizer that a user names.

    Args:
        source: A source for `tokenizer_directory`.

    Raises:
        UpcyclingError: There is no such directory, or the directory has no tokenizer.
    """
    if find_directory(source) is None:
        raise UpcyclingError(
            f"no tokenizer directory at {source}; expected one with {' or '.join(NEEDED)}, or a "
            "model's name in the local hub cache. Check the path (relative paths start where the "
            "command runs), or fetch a model's first with `hf download NAME`."
        )
    directory = tokenizer_directory(source)
    if directory is None:
        raise UpcyclingError(
            f"{resolve_directory(source)} holds no tokenizer; expected one of {', '.join(NEEDED)}. "
            "Put the model's tokenizer there, or name the directory that has it."
        )
    return directory


def tokenizer_directory(source: str | Path) -> Path | None:
    """Return the directory of a checkpoint's tokenizer; None if there is none.

    Args:
        source: A directory of Hugging Face or NeMo 2, a trained checkpoint, a run's directory, a
            GGUF file, or a hub name in the local cache.

    Raises:
        UpcyclingError: There is no such checkpoint.
    """
    directory = resolve_trained(source)
    file = gguf_in(directory)
    layout = None if file or is_huggingface(directory) else find_layout(directory)
    found = find_tokenizer(directory, layout.context if layout else None)
    return found or (_of_gguf(file) if file else None)


def _of_gguf(file: Path) -> Path | None:
    """Return a directory with the tokenizer of a GGUF file, as transformers converts it.

    The directory is made once per file, among the temporary files. None if transformers fails.
    """
    stat = file.stat()
    said = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    place = place_of(hashlib.sha256(said.encode()).hexdigest())
    if not (place / "tokenizer").is_dir():
        from transformers import AutoTokenizer

        partial = place / str(os.getpid())
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer.save_pretrained(partial)
            partial.rename(place / "tokenizer")
        except (
            Exception
        ):  # vocabularies of other programs can raise anything; or another was faster
            shutil.rmtree(partial, ignore_errors=True)
    return find_tokenizer(place / "tokenizer", None)
