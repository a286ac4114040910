"""The indexed dataset: Megatron reads back exactly the tokenised documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data import indexed
from nemo_upcycle.data.indexed import IndexedDatasetStats, build_indexed_dataset
from nemo_upcycle.data.tokenizer import train_tokenizer
from nemo_upcycle.errors import UpcyclingError

TEXTS = ["Every expert starts as the dense layer.", "日本語 ü", "", "def f():\n    return 1\n", "x"]
EOS = 1


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([write(root / "corpus.jsonl", TEXTS)], root / "tokenizer", 280)
    return root / "tokenizer"


def expected_documents(tokenizer_dir: Path, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    return [[*tokenizer.encode(text), EOS] for text in texts if text]


def load(prefix: Path) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


@pytest.mark.parametrize("batch", [1, 2, 512])
def test_megatron_reads_the_documents_back(
    tokenizer_dir: Path, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.setattr(indexed, "_BATCH_DOCUMENTS", batch)
    jsonl = write(tmp_path / "documents.jsonl", TEXTS)
    prefix = tmp_path / "new" / "data.v1"
    stats = build_indexed_dataset(jsonl, tokenizer_dir, prefix)
    documents = expected_documents(tokenizer_dir, TEXTS)
    dataset = load(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    assert dataset[0].dtype == np.uint16
    tokens = sum(map(len, documents))
    assert stats == IndexedDatasetStats(4, tokens, jsonl.stat().st_size, prefix)
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["data.v1.bin", "data.v1.idx"]
    assert (prefix.parent / "data.v1.bin").stat().st_size == 2 * tokens


def test_large_ids_get_a_wider_type(tokenizer_dir: Path, tmp_path: Path) -> None:
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(65_500 - len(tokenizer))])
    tokenizer.save_pretrained(str(tmp_path / "large"))
    jsonl = write(tmp_path / "documents.jsonl", ["dense <extra_65000>"])
    build_indexed_dataset(jsonl, tmp_path / "large", tmp_path / "data")
    dataset = load(tmp_path / "data")
    assert dataset[0].dtype == np.int32
    assert tokenizer.convert_tokens_to_ids("<extra_65000>") in dataset[0].tolist()


def test_progress_ends_at_the_size_of_the_file(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_BATCH_CHARACTERS", 30)
    jsonl = write(tmp_path / "documents.jsonl", TEXTS * 3)
    calls: list[tuple[int, int]] = []
    build_indexed_dataset(
        jsonl, tokenizer_dir, tmp_path / "data", progress=lambda *call: calls.append(call)
    )
    size = jsonl.stat().st_size
    assert len(calls) > 3
    assert calls == sorted(set(calls))
    assert calls[-1] == (size, size)
    assert {total for _, total in calls} == {size}


def test_building_again_replaces(tokenizer_dir: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    build_indexed_dataset(write(tmp_path / "a.jsonl", TEXTS), tokenizer_dir, prefix)
    build_indexed_dataset(write(tmp_path / "b.jsonl", ["new"]), tokenizer_dir, prefix)
    dataset = load(prefix)
    assert [dataset[0].tolist()] == expected_documents(tokenizer_dir, ["new"])
    assert len(dataset) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n{"text": \n', r"bad\.jsonl:3: "),
        (b'{"text": ""}\n\n', "no document with text"),
    ],
)
def test_bad_input_leaves_nothing_behind_and_old_data_alone(
    tokenizer_dir: Path,
    tmp_path: Path,
    content: bytes,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexed, "_BATCH_DOCUMENTS", 1)  # the error comes after tokens are written
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    out = tmp_path / "out"
    with pytest.raises(UpcyclingError, match=message):
        build_indexed_dataset(bad, tokenizer_dir, out / "data")
    assert not list(out.iterdir())
    build_indexed_dataset(write(tmp_path / "a.jsonl", TEXTS), tokenizer_dir, out / "data")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UpcyclingError, match=message):
        build_indexed_dataset(bad, tokenizer_dir, out / "data")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_missing_parts_are_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    jsonl = write(tmp_path / "documents.jsonl", TEXTS)
    with pytest.raises(UpcyclingError, match=r"no tokenizer directory at .*gpt2"):
        build_indexed_dataset(jsonl, tmp_path / "gpt2", tmp_path / "data")
    with pytest.raises(UpcyclingError, match=r"missing\.jsonl"):
        build_indexed_dataset(tmp_path / "missing.jsonl", tokenizer_dir, tmp_path / "data")


def test_tokenizer_without_eos_is_an_error(tokenizer_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(tmp_path / "without"))
    with pytest.raises(UpcyclingError, match="no eos token"):
        build_indexed_dataset(
            write(tmp_path / "a.jsonl", TEXTS), tmp_path / "without", tmp_path / "data"
        )
