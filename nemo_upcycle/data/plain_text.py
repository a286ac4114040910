"""Encode text as text, even where the text spells a special token.

The text "see </s> in the vocabulary" must not contain an end-of-document token. The option
`encode_special_tokens` of `tokenizers` is not enough: Unigram and WordLevel models find `</s>` in
the vocabulary. So special tokens keep the ids and get vocabulary names that occur in no text.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

_NOWHERE = "\U0010fffe"
"""A Unicode noncharacter; two surround the vocabulary name of a token that no text may produce."""


def is_nowhere(token: str) -> bool:
    """Return whether a token of a vocabulary made by `plain` can be produced by no text."""
    return token.startswith(_NOWHERE)


def plain(tokenizer: Any, special: Iterable[str]) -> Any:
    """Return a tokenizer that encodes the spelling of special tokens as ordinary text.

    Args:
        tokenizer: A tokenizer of `tokenizers`, or a slow one of transformers, changed in place.
        special: The tokenizer's special tokens.
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
    described["post_processor"] = None  # only adds special tokens, which are not wanted
    for token in described["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:  # Unigram model: tokens with scores, ordered by id
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        kept = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
        model["merges"] = kept
    return described


def _without(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """Remove the special tokens from the text matching of a slow tokenizer of transformers."""
    added = tokenizer._added_tokens_decoder
    kept = {number: token for number, token in added.items() if str(token) not in names}
    tokenizer._added_tokens_decoder = kept
    tokenizer._added_tokens_encoder = {str(token): number for number, token in kept.items()}
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    return tokenizer


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches any of the tokens, the longest at each position.

    Common prefixes are merged: 256 separate alternatives would be tried at each character.
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
