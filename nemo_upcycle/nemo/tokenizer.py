"""The tokenizer of a dense checkpoint."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.checkpoint.tokenizer_directory import named_tokenizer
from nemo_upcycle.checkpoint.tokenizer_files import doubtful_end, load_alone
from nemo_upcycle.data.encoder import other_tokenizer
from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer


def checkpoint_tokenizer(source: str, model: str | None = None) -> "AutoTokenizer":
    """Load the tokenizer of a dense checkpoint, never from the network.

    Args:
        source: A directory of Hugging Face or NeMo 2, or a hub name in the local cache.
        model: The dense checkpoint to train, if different from `source`.

    Returns:
        NeMo's tokenizer.

    Raises:
        UpcyclingError: The directory is missing or has no tokenizer.
    """
    if model is None:
        resolve_directory(source)  # an error here names the dense checkpoint
    directory = named_tokenizer(source)
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.utils.get_rank import is_global_rank_zero

    tokenizer, alone = load_alone(directory)
    if is_global_rank_zero():
        doubts = [doubtful_end(tokenizer, _directory(model) or resolve_directory(source))]
        if model is not None and (own := other_tokenizer(tokenizer, model)):
            doubts.append(
                f"{directory} gives texts other tokens than {own}, the tokenizer beside the dense "
                "weights: the dense model does not know them as they are used here."
            )
        for doubt in filter(None, doubts):
            print(f"[data] {doubt}", file=sys.stderr, flush=True)
    return AutoTokenizer(str(alone))


def _directory(model: str | None) -> Path | None:
    """Return a checkpoint's directory; None if missing, because a resume needs no dense model."""
    try:
        return None if model is None else resolve_directory(model)
    except UpcyclingError:
        return None
