"""The tokenizer of a dense checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.checkpoint.megatron import find_layout
from nemo_upcycle.errors import UpcyclingError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CONTEXT = ("tokenizer", "nemo_tokenizer")
"""Where NeMo 2 keeps it in `context/`: as training and as importing a model save it."""

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer


def checkpoint_tokenizer(source: str) -> "AutoTokenizer":
    """Load the tokenizer of a dense checkpoint, never from the network.

    Args:
        source: A directory of Hugging Face's or NeMo 2's, or a hub name that is in the local cache.

    Returns:
        NeMo's tokenizer.

    Raises:
        UpcyclingError: There is no such directory, or no tokenizer in it.
    """
    directory = resolve_directory(source)
    places = _places(directory)
    found = [place for place in places if any((place / name).is_file() for name in FILES)]
    if not found:
        raise UpcyclingError(
            f"{directory} holds no tokenizer; expected one of {', '.join(FILES)}. "
            "Put the model's tokenizer there, or name its directory: tokenizer=DIR."
        )
    from nemo.collections.common.tokenizers import AutoTokenizer

    return AutoTokenizer(str(found[0]))


def _places(directory: Path) -> list[Path]:
    layout = None if (directory / "config.json").is_file() else find_layout(directory)
    if layout is None or layout.context is None:
        return [directory]
    return [directory, *(layout.context / name for name in CONTEXT)]
