"""Text is text, also where it spells a special token: "see </s> in the vocabulary" has no end.

`encode_special_tokens` of `tokenizers` is not enough: a Unigram or WordLevel model finds `</s>` in
its vocabulary by itself. So the special tokens get names there that no text has; their ids stay.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

_NOWHERE = "\U0010fffe"
"""Two of these, a noncharacter of Unicode, surround the name of a token that no text may have."""


def is_nowhere(token: str) -> bool:
    """Return whether a token of `plain`'s vocabulary is one that no text gets."""
    return token.startswith(_NOWHERE)


def plain(tokenizer: Any, special: Iterable[str]) -> Any:
    """Return a tokenizer that takes special tokens for the text that they are.

    Args:
        tokenizer: Of `tokenizers`, or one of transformers' own, which is changed.
        special: Its special tokens.
    """
    names = {token: f"{_NOWHERE}{token}{_NOWHERE}" for token in special}
    if not names:
        return tokenizer
    if hasattr(tokenizer, "to_str"):
        described = json.loads(tokenizer.to_str())
        return type(tokenizer).from_str(json.dumps(_renamed(described, names)))
    return _without(tokenizer, names)


def _renamed(described: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename tokens wherever a `tokenizer.json` names them."""
    described["post_processor"] = None  # which adds special tokens, and is not asked to
    for token in described["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:  # a Unigram model's: tokens with scores, in the order of their ids
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        kept = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
        model["merges"] = kept
    return described


def _without(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """Make one of transformers' slow tokenizers not look for special tokens."""
    added = tokenizer._added_tokens_decoder
    kept = {number: token for number, token in added.items() if str(token) not in names}
    tokenizer._added_tokens_decoder = kept
    tokenizer._added_tokens_encoder = {str(token): number for number, token in kept.items()}
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    return tokenizer


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds any of some tokens, the longest at each place.

    What several begin with is written once: 256 alternatives would be tried at each character.
    """
    root: dict[str, Any] = {}
    for token in filter(None, tokens):
        node = root
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_alternatives(root)) if root else None


def _alternatives(node: dict[str, Any]) -> str:
    ways = [re.escape(c) + _alternatives(after) for c, after in node.items() if c]
    if not ways:
        return ""
    optional = "?" if "" in node else ""
    return f"(?:{'|'.join(ways)}){optional}" if optional or len(ways) > 1 else ways[0]
