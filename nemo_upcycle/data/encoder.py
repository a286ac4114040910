"""A tokenizer that is small enough to be sent to worker processes."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_upcycle.checkpoint.tokenizer_directory import tokenizer_directory
from nemo_upcycle.checkpoint.tokenizer_files import load_tokenizer
from nemo_upcycle.data.plain_text import is_nowhere, pattern_of, plain
from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "The router sends each token to 2 of 8 experts; it's 3.14159 times faster, isn't it?\n\n",
    "\tdef f(x):\n\t    return {'a': [1, 22, 333, 4444, 12345678]}  # TODO\r\n",
    "ÀÉÎõü ﬁ ½ ① İstanbul ΑΒΓ кириллица 日本語のテキスト 한국어 العربية हिन्दी ไทย",
    "👩🏽\u200d🚀 e\u0301 \u00a0\u2028\u200b\ufeff",
    "  two  spaces   three    four\n \n  \n\t\tTitle CASE lower_snake camelCase https://host/p?q=1#x",
)
"""Texts that tell tokenizers apart: digits, spaces, case, scripts, normal forms.

Manifests contain fingerprints of these texts' tokens: any change invalidates all manifests.
"""


@dataclass(frozen=True)
class Encoder:
    """An encoder from texts to tokens.

    The encoder is loaded once and sent to the worker processes. The workers therefore need not
    import transformers, which takes seconds per process.

    Attributes:
        tokenizer: A tokenizer of `tokenizers`, or a slow one of transformers.
        eos: Id of the token that ends a document.
        dtype: Type of the tokens in Megatron's files.
        special: Pattern that matches special tokens spelled out in texts; None if there are none.
    """

    tokenizer: Any
    eos: int
    dtype: str
    special: re.Pattern[str] | None = None

    def tokens(self, texts: list[str]) -> Iterable[list[int]]:
        """Return each text's tokens, without special tokens before or after them."""
        if hasattr(self.tokenizer, "encode_batch_fast"):
            # Equivalent to the call below, without the unused masks and offsets.
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return (each.ids for each in encoded)
        # verbose=False: a document longer than the model's context is not worth a warning here.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def spelled(self, texts: Iterable[str]) -> int:
        """Count the special tokens spelled out in texts."""
        if self.special is None:
            return 0
        return sum(len(self.special.findall(text)) for text in texts)

    def fingerprint(self) -> str:
        """Return a hash that is equal for tokenizers that give all texts the same tokens.

        The hash covers the vocabulary and the tokens of `PROBES` and of the vocabulary's entries.
        Files are not hashed, because equivalent files can differ. Special tokens count only if
        texts can produce special tokens.
        """
        vocabulary = self.tokenizer.get_vocab()
        known = sorted((n, token) for token, n in vocabulary.items() if not is_nowhere(token))
        # Byte-level BPE, SentencePiece and WordPiece mark the start of a word differently; a space
        # stands for all marks.
        words = [re.sub("[Ġ▁]", " ", token.replace("Ċ", "\n")) for _, token in known]
        digest = hashlib.sha256(json.dumps(known).encode())
        for tokens in self.tokens([*PROBES, *filter(None, words)]):
            digest.update(np.array([*tokens, -1], np.int32).tobytes())
        return digest.hexdigest()


def load_encoder(directory: Path, parse_special: bool = False) -> Encoder:
    """Load a tokenizer from disk and check that the tokenizer can end a document.

    Args:
        directory: The tokenizer's directory.
        parse_special: Encode the spelling of a special token as that token, as transformers does.

    Raises:
        UpcyclingError: There is no tokenizer, or the tokenizer has no eos token.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.eos_token_id is None:
        raise UpcyclingError(
            f"the tokenizer in {directory} has no eos token, and every document needs one at its "
            'end; set "eos_token" in its tokenizer_config.json'
        )
    return encoder_of(tokenizer, parse_special)


def encoder_of(tokenizer: "PreTrainedTokenizerBase", parse_special: bool = False) -> Encoder:
    """Make an encoder from a tokenizer without changing the tokenizer."""
    # The largest id instead of the number of tokens: added tokens may leave gaps.
    largest = max(tokenizer.get_vocab().values()) + 1
    eos: Any = tokenizer.eos_token_id
    special = special_tokens(tokenizer)
    fast: Any = tokenizer
    if tokenizer.is_fast:
        fast = tokenizer.backend_tokenizer
        fast = type(fast).from_str(fast.to_str())
        fast.no_truncation()
        fast.no_padding()
    else:
        fast = copy.deepcopy(tokenizer)
    return Encoder(
        tokenizer=fast if parse_special else plain(fast, special),
        eos=eos,
        # The same threshold as in Megatron.
        dtype="uint16" if largest < 65500 else "int32",
        special=pattern_of(special),
    )


def other_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: str | Path) -> Path | None:
    """Return the tokenizer beside a model's weights if the two tokenizers differ, else None.

    Also None if the model has no readable tokenizer: then `tokenizer` is taken at face value.

    Args:
        tokenizer: The tokenizer to use with the model.
        model: The model's checkpoint, or a run's directory.
    """
    try:
        own = tokenizer_directory(model)
        beside = None if own is None else encoder_of(load_tokenizer(own))
    except UpcyclingError:
        return None
    if beside is None or beside.fingerprint() == encoder_of(tokenizer).fingerprint():
        return None
    return own


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """Return a tokenizer's special tokens; other added tokens are text."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(tokenizer.all_special_tokens) | {str(t) for t in added if t.special}
