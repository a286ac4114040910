"""Text that spells a special token is text; added tokens that are not special are tokens."""

import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.checkpoint.tokenizer_files import load_tokenizer
from nemo_upcycle.data.encoder import Encoder, encoder_of, load_encoder, special_tokens
from nemo_upcycle.data.plain_text import pattern_of
from tests.tokenizers import SPECIAL, write_sentencepiece, write_tokenizer

KINDS = ("BPE", "Unigram", "WordLevel", "sentencepiece")
SPELLED = ["see </s> in the vocabulary", "</s>", "<s>see<unk> the</s></s>", "a </s", "end</s>\n"]
PLAIN = ["see the end", " two  experts.", "", "x<tool_call>y <tool_call> z", "日本"]


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return write_sentencepiece(root / "tokenizer", tokenizer_class="LlamaTokenizer")
    return write_tokenizer(root / "tokenizer", request.param)


def ids_of(encoder: Encoder, text: str) -> list[int]:
    return list(next(iter(encoder.tokens([text]))))


def test_no_text_gets_a_special_token(directory: Path) -> None:
    encoder, loaded = load_encoder(directory), load_tokenizer(directory)
    special = {loaded.convert_tokens_to_ids(token) for token in SPECIAL}
    for text in SPELLED:
        ids = ids_of(encoder, text)
        assert not set(ids) & (special - {loaded.unk_token_id}), text
        assert ids or not text


def test_other_texts_get_what_transformers_gives_them(directory: Path) -> None:
    encoder, loaded = load_encoder(directory), load_tokenizer(directory)
    assert PLAIN
    for text in PLAIN:
        assert ids_of(encoder, text) == loaded.encode(text, add_special_tokens=False), text


def test_asked_for_they_are_parsed_as_transformers_does(directory: Path) -> None:
    encoder, loaded = load_encoder(directory, parse_special=True), load_tokenizer(directory)
    for text in SPELLED + PLAIN:
        assert ids_of(encoder, text) == loaded.encode(text, add_special_tokens=False), text


def test_what_is_text_can_be_read_again(directory: Path) -> None:
    """In the pieces that the text around would get."""
    loaded = load_tokenizer(directory)
    if loaded.backend_tokenizer.model.__class__.__name__ == "WordLevel":
        assert ids_of(load_encoder(directory), "see </s>")[-1] == loaded.unk_token_id
        return
    for text in SPELLED[:2]:
        assert loaded.decode(ids_of(load_encoder(directory), text)).strip() == text


def test_processes_get_the_same(directory: Path) -> None:
    encoder = load_encoder(directory)
    sent = pickle.loads(pickle.dumps(encoder))
    for text in SPELLED + PLAIN:
        assert ids_of(sent, text) == ids_of(encoder, text)
    assert sent.fingerprint() == encoder.fingerprint()


def test_a_slow_tokenizer_too(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    write_sentencepiece(tmp_path, tokenizer_class="LlamaTokenizer")
    slow: Any = LlamaTokenizer.from_pretrained(str(tmp_path), legacy=True)
    slow.add_tokens(["<tool_call>"])
    encoder, parsing = encoder_of(slow), encoder_of(slow, parse_special=True)
    assert slow.eos_token_id in ids_of(parsing, SPELLED[0])
    for text in SPELLED:
        assert not set(ids_of(encoder, text)) & {slow.eos_token_id, slow.bos_token_id}
    for text in PLAIN:
        assert ids_of(encoder, text) == slow.encode(text, add_special_tokens=False)
    assert slow.encode("</s>", add_special_tokens=False) == [slow.eos_token_id]  # is as it was


# --- The same tokenizer --------------------------------------------------------------------------


def test_fingerprints_tell_tokenizers_apart_that_differ(tmp_path: Path) -> None:
    """One vocabulary, other merges; another case; another added token."""
    directory = write_tokenizer(tmp_path / "a", "BPE")
    described = json.loads((directory / "tokenizer.json").read_text())
    found = {load_encoder(directory).fingerprint()}
    merges = described["model"]["merges"]
    changes: list[dict[str, Any]] = [
        {"model": described["model"] | {"merges": merges[1:]}},
        {"normalizer": {"type": "Lowercase"}},
    ]
    for change in changes:
        (directory / "tokenizer.json").write_text(json.dumps(described | change))
        found.add(load_encoder(directory).fingerprint())
    without = write_tokenizer(tmp_path / "b", "BPE", added=())
    found.add(load_encoder(without).fingerprint())
    assert len(found) == 4


def test_fingerprints_look_at_nothing_else(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "a", "BPE")
    first = load_encoder(directory).fingerprint()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    changed = settings | {"model_max_length": 7, "chat_template": "{{ messages }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(changed, sort_keys=True))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    described = json.loads((directory / "tokenizer.json").read_text())
    described |= {"truncation": None, "post_processor": None, "decoder": None}
    (directory / "tokenizer.json").write_text(json.dumps(described, indent=4))
    assert load_encoder(directory).fingerprint() == first


def test_a_pattern_finds_the_longest_of_many() -> None:
    rng = random.Random(0)
    letters = "<|>ab/.("
    for _ in range(50):
        tokens = {"".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(20)}
        text = "".join(rng.choices(letters, k=300))
        ordered = sorted(tokens, key=len, reverse=True)
        expected = re.findall("|".join(map(re.escape, ordered)), text)
        pattern = pattern_of(tokens)
        assert pattern is not None
        assert pattern.findall(text) == expected
    assert pattern_of([]) is None


def test_added_tokens_are_not_special(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_tokenizer(tmp_path, "BPE"))
    assert special_tokens(loaded) == set(SPECIAL)
