"""A tokenizer, small enough to be sent to processes."""

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
"""Texts on which tokenizers that differ differ: digits, spaces, case, scripts, normal forms.

Manifests have what comes of them: another text here would make all tokenizers others.
"""


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of texts.

    It is loaded once and sent to the processes, which then need not import transformers: that takes
    each of them seconds.

    Attributes:
        tokenizer: Of `tokenizers`, or transformers' own where it has none of those.
        eos: The token that ends a document.
        dtype: The tokens' type in Megatron's files.
        special: Finds what a text spells of special tokens; None where there are none.
    """

    tokenizer: Any
    eos: int
    dtype: str
    special: re.Pattern[str] | None = None

    def tokens(self, texts: list[str]) -> Iterable[list[int]]:
        """Return each text's tokens; none is put before or after them."""
        if hasattr(self.tokenizer, "encode_batch_fast"):
            # What the call below comes to, without the masks and offsets that nobody asks for.
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return (each.ids for each in encoded)
        # verbose: a document longer than the model's context is no reason for a warning here.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def spelled(self, texts: Iterable[str]) -> int:
        """Count the special tokens that texts spell out."""
        if self.special is None:
            return 0
        return sum(len(self.special.findall(text)) for text in texts)

    def fingerprint(self) -> str:
        """Return what is equal for tokenizers that give all texts the same tokens.

        Of the vocabulary and of what texts get, not of files: these say the same in many ways, and
        more besides. Special tokens count where texts can get them.
        """
        vocabulary = self.tokenizer.get_vocab()
        known = sorted((n, token) for token, n in vocabulary.items() if not is_nowhere(token))
        # What marks a word's begin is what the vocabularies of byte-level BPE, SentencePiece and
        # WordPiece write for it.
        words = [re.sub("[Ġ▁]", " ", token.replace("Ċ", "\n")) for _, token in known]
        digest = hashlib.sha256(json.dumps(known).encode())
        for tokens in self.tokens([*PROBES, *filter(None, words)]):
            digest.update(np.array([*tokens, -1], np.int32).tobytes())
        return digest.hexdigest()


def load_encoder(directory: Path, parse_special: bool = False) -> Encoder:
    """Load a tokenizer from disk and make sure that it can end a document.

    Args:
        directory: The tokenizer's.
        parse_special: Take what spells a special token for it, as transformers does.

    Raises:
        UpcyclingError: There is none, or it has no eos token.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.eos_token_id is None:
        raise UpcyclingError(
            f"the tokenizer in {directory} has no eos token, and every document needs one at its "
            'end; set "eos_token" in its tokenizer_config.json'
        )
    return encoder_of(tokenizer, parse_special)


def encoder_of(tokenizer: "PreTrainedTokenizerBase", parse_special: bool = False) -> Encoder:
    """Make an encoder of a tokenizer, which stays as it is."""
    # The largest id and not the number of tokens: added tokens may leave gaps.
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
        # Megatron's own choice.
        dtype="uint16" if largest < 65500 else "int32",
        special=pattern_of(special),
    )


def other_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: str | Path) -> Path | None:
    """Return the tokenizer beside a model's weights if it gives texts other tokens, else None.

    Also None where there is none that can be read: what is given counts then.

    Args:
        tokenizer: What is to be used with the model.
        model: Its checkpoint, or a run's directory.
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
    """Return a tokenizer's special tokens; other added ones are text."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(tokenizer.all_special_tokens) | {str(t) for t in added if t.special}
