"""Find the directory of a tokenizer that a user names."""

from pathlib import Path

from nemo_upcycle.checkpoint.huggingface import find_directory, is_huggingface, resolve_directory
from nemo_upcycle.checkpoint.megatron import find_layout
from nemo_upcycle.checkpoint.run_directory import resolve_trained
from nemo_upcycle.checkpoint.tokenizer_files import NEEDED, find_tokenizer
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
        source: A directory of Hugging Face or NeMo 2, a trained checkpoint, a run's directory, or
            a hub name in the local cache.

    Raises:
        UpcyclingError: There is no such checkpoint.
    """
    directory = resolve_trained(source)
    layout = None if is_huggingface(directory) else find_layout(directory)
    return find_tokenizer(directory, layout.context if layout else None)
