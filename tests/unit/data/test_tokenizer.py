"""The trained tokenizer: lossless, the same every time, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.data.tokenizer import read_documents, train_tokenizer
from nemo_upcycle.errors import UpcyclingError

VOCAB_SIZE = 400
TEXTS = [
    "Upcycling copies the dense feed-forward layer to every expert of the layer.",
    "The router sends every token to its experts; the top-k gates sum to one.",
    "def upcycle(dense):\n    return [copy(dense) for _ in range(8)]\n",
    "Grüße, naïve café: über 100 % 日本語のテキスト.",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def directory(corpus: Path) -> Path:
    out = corpus.parent / "tokenizer"
    assert train_tokenizer([corpus], out, VOCAB_SIZE) == VOCAB_SIZE
    return out


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS,
        "",
        " leading and trailing ",
        "a , b . c 's don 't  ! ?",
        "\r\n\t\x00\x7f  \u00a0",
        "never seen: ЖЩ 🧵👩‍👩‍👧 العربية",
        "e\u0301 is not \u00e9",
        "literal <s> and </s> inside",
    ],
)
def test_every_text_comes_back(directory: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_size(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 1)
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE
    assert max(tokenizer.get_vocab().values()) == VOCAB_SIZE - 1
    assert set(tokenizer(TEXTS[0])) == {"input_ids", "attention_mask"}, "as a Llama takes"
    tokens = tokenizer.encode(TEXTS[0])
    assert not {0, 1} & set(tokens), "no token of its own"
    assert len(tokens) < len(TEXTS[0].encode()) / 2, "it has learnt merges"


def test_training_again_gives_the_same_bytes(directory: Path, corpus: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    train_tokenizer([corpus], again, VOCAB_SIZE)
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        assert (again / name).read_bytes() == (directory / name).read_bytes()


def test_replaces_a_tokenizer_but_nothing_else(corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    train_tokenizer([corpus], out, 300)
    train_tokenizer([corpus], out, 320)
    assert len(AutoTokenizer.from_pretrained(str(out))) == 320
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UpcyclingError, match="not a tokenizer"):
        train_tokenizer([corpus], other, 300)
    assert (other / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize(("size", "message"), [(5000, "too small"), (257, "at least 258")])
def test_unreachable_vocabulary_is_an_error(
    corpus: Path, tmp_path: Path, size: int, message: str
) -> None:
    with pytest.raises(UpcyclingError, match=message):
        train_tokenizer([corpus], tmp_path / "out", size)
    assert not list(tmp_path.iterdir())


def test_read_documents_counts_bytes_and_passes_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    # A line separator inside a text is no line end.
    path.write_bytes('{"text": "ü\u2028"}\r\n\n{"text": "b", "id": 7}'.encode())
    assert list(read_documents(path)) == [("ü\u2028", 19), ("b", path.stat().st_size)]


@pytest.mark.parametrize(
    "line",
    [b"{", b"\xff", b'["text"]', b'{"txt": "a"}', b'{"text": 1}', rb'{"text": "\ud800"}'],
)
def test_malformed_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UpcyclingError, match=r"documents\.jsonl:3: "):
        list(read_documents(path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"missing\.jsonl"):
        train_tokenizer([tmp_path / "missing.jsonl"], tmp_path / "out", 300)
