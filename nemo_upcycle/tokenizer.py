"""The tokenizer of a dense checkpoint."""

from typing import TYPE_CHECKING

from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.errors import UpcyclingError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer


def checkpoint_tokenizer(source: str) -> "AutoTokenizer":
    """Load the tokenizer of a Hugging Face directory, never from the network.

    Args:
        source: The directory, or a hub name that is in the local cache.

    Returns:
        NeMo's tokenizer.

    Raises:
        UpcyclingError: There is no such directory, or no tokenizer in it.
    """
    directory = resolve_directory(source)
    if not any((directory / name).is_file() for name in FILES):
        raise UpcyclingError(
            f"{directory} holds no tokenizer; expected one of {', '.join(FILES)}. "
            "Put the model's tokenizer there, or name its directory: tokenizer=DIR."
        )
    from nemo.collections.common.tokenizers import AutoTokenizer

    return AutoTokenizer(str(directory))
