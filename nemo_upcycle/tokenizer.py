"""The tokenizer of a dense checkpoint."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.checkpoint.huggingface import find_directory, resolve_directory
from nemo_upcycle.checkpoint.megatron import find_layout
from nemo_upcycle.checkpoint.run_directory import resolve_trained
from nemo_upcycle.checkpoint.tokenizer_files import (
    NEEDED,
    doubtful_end,
    find_tokenizer,
    load_alone,
)
from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer


def checkpoint_tokenizer(source: str, model: str | None = None) -> "AutoTokenizer":
    """Load the tokenizer of a dense checkpoint, never from the network.

    Args:
        source: A directory of Hugging Face's or NeMo 2's, or a hub name that is in the local cache.
        model: The dense checkpoint that it is to train on, where that is another.

    Returns:
        NeMo's tokenizer.

    Raises:
        UpcyclingError: There is no such directory, or no tokenizer in it.
    """
    found = tokenizer_directory(source)
    if found is None:
        raise UpcyclingError(
            f"{resolve_directory(source)} holds no tokenizer; expected one of {', '.join(NEEDED)}. "
            "Put the model's tokenizer there, or name its directory: tokenizer=DIR."
        )
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.utils.get_rank import is_global_rank_zero

    tokenizer, alone = load_alone(found)
    doubt = doubtful_end(tokenizer, _directory(model) or resolve_directory(source))
    if doubt and is_global_rank_zero():
        print(f"[data] {doubt}", file=sys.stderr, flush=True)
    return AutoTokenizer(str(alone))


def _directory(model: str | None) -> Path | None:
    """Return a checkpoint's directory; None where it is gone, for a resume does not need it."""
    try:
        return None if model is None else resolve_directory(model)
    except UpcyclingError:
        return None


def named_tokenizer(source: str | Path) -> Path:
    """Return the directory of the tokenizer that a user names.

    Args:
        source: What `tokenizer_directory` takes.

    Raises:
        UpcyclingError: There is no such directory, or no tokenizer in it.
    """
    if find_directory(source) is None:
        raise UpcyclingError(
            f"no tokenizer directory at {source}; expected one with {' or '.join(NEEDED)}, or a "
            "model's name in the local hub cache. Check the path (relative paths start where the "
            "command runs), or fetch a model's first with `hf download NAME`."
        )
    found = tokenizer_directory(source)
    if found is None:
        raise UpcyclingError(
            f"{resolve_directory(source)} holds no tokenizer; expected one of {', '.join(NEEDED)}. "
            "Put the model's tokenizer there, or name the directory that has it."
        )
    return found


def tokenizer_directory(source: str | Path) -> Path | None:
    """Return where the tokenizer of a checkpoint is, None if it has none.

    Args:
        source: What `checkpoint_tokenizer` takes, or a trained checkpoint.

    Raises:
        UpcyclingError: There is no such checkpoint.
    """
    directory = resolve_trained(source)
    layout = None if (directory / "config.json").is_file() else find_layout(directory)
    return find_tokenizer(directory, layout.context if layout else None)
