"""A tokenizer, small enough to be sent to processes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of texts.

    It is loaded once and sent to the processes, which then need not import transformers: that takes
    each of them seconds.

    Attributes:
        tokenizer: Of `tokenizers`, or transformers' own where it has none of those.
        eos: The token that ends a document.
        dtype: The tokens' type in Megatron's files.
    """

    tokenizer: Any
    eos: int
    dtype: str

    def tokens(self, texts: list[str]) -> Iterable[list[int]]:
        """Return each text's tokens, without special ones."""
        if hasattr(self.tokenizer, "encode_batch_fast"):
            # What the call below comes to, without the masks and offsets that nobody asks for.
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return (each.ids for each in encoded)
        # verbose: a document longer than the model's context is no reason for a warning here.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def load_encoder(directory: Path) -> Encoder:
    """Load a tokenizer from disk and make sure that it can end a document.

    Raises:
        UpcyclingError: There is none, or it has no eos token.
    """
    tokenizer = load_tokenizer(directory)
    # The largest id and not the number of tokens: added tokens may leave gaps.
    largest = max(tokenizer.get_vocab().values()) + 1
    eos: Any = tokenizer.eos_token_id
    # Megatron's own choice.
    dtype = "uint16" if largest < 65500 else "int32"
    return Encoder(tokenizer.backend_tokenizer if tokenizer.is_fast else tokenizer, eos, dtype)


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer as `load_encoder` does."""
    import transformers

    auto_tokenizer: Any = transformers.AutoTokenizer  # has no type annotations
    if not directory.is_dir():  # otherwise taken for the name of a model on the hub
        raise UpcyclingError(f"no tokenizer directory at {directory}")
    tokenizer: PreTrainedTokenizerBase = auto_tokenizer.from_pretrained(
        str(directory), use_fast=True, local_files_only=True
    )
    if tokenizer.eos_token_id is None:
        raise UpcyclingError(
            f"the tokenizer in {directory} has no eos token, and every document needs one at its "
            'end; set "eos_token" in its tokenizer_config.json'
        )
    if tokenizer.is_fast:
        fast: Any = tokenizer.backend_tokenizer
        fast.no_truncation()
        fast.no_padding()
    return tokenizer
