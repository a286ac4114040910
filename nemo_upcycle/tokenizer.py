"""The tokenizer of a dense checkpoint."""

from typing import TYPE_CHECKING

from nemo_upcycle.checkpoint.huggingface import resolve_directory

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer


def checkpoint_tokenizer(source: str) -> "AutoTokenizer":
    """Load the tokenizer of a Hugging Face directory, never from the network.

    Args:
        source: The directory, or a hub name that is in the local cache.

    Returns:
        NeMo's tokenizer.

    Raises:
        UpcyclingError: There is no such directory.
    """
    directory = resolve_directory(source)
    from nemo.collections.common.tokenizers import AutoTokenizer

    return AutoTokenizer(str(directory))
