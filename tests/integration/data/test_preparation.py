"""From documents to Megatron's dataset: the same whatever the format, the processes, the kills."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data import parts
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import (
    TEXTS,
    compressed,
    contents,
    directory,
    documents_in,
    expected_documents,
    load,
    many,
    parquet,
    prepared,
    tokenized,
    write,
    zstandard,
)

# --- The dataset ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 512])
def test_megatron_reads_the_documents_back(
    tokenizer: Path, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.setattr(parts, "BATCH_DOCUMENTS", batch)
    prefix = tmp_path / "new" / "data.v1"
    manifest = prepared(write(tmp_path / "a.jsonl", TEXTS), tokenizer, prefix)
    documents = expected_documents(tokenizer, TEXTS)
    dataset = load(prefix)
    assert documents_in(prefix) == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    assert dataset[0].dtype == np.uint16
    assert (manifest.documents, manifest.tokens) == (4, sum(map(len, documents)))
    assert (manifest.empty, manifest.malformed, manifest.dtype) == (1, 0, "uint16")
    names = ["data.v1.bin", "data.v1.idx", "data.v1.manifest.json"]
    assert sorted(contents(prefix.parent)) == names
    assert sorted(path.name for path in prefix.parent.iterdir()) == names


def test_files_are_those_of_megatrons_builder(tokenizer: Path, tmp_path: Path) -> None:
    """Byte for byte, from many parts and two processes."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = many(500)
    prepared(write(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "ours", 2, part_bytes=30_000)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), DType.optimal_dtype(280))
    for document in expected_documents(tokenizer, texts):
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_large_ids_get_a_wider_type(tokenizer: Path, tmp_path: Path) -> None:
    import numpy as np
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    loaded.add_tokens([f"<extra_{i}>" for i in range(65_500 - len(loaded))])
    loaded.save_pretrained(str(tmp_path / "large"))
    source = write(tmp_path / "a.jsonl", ["dense <extra_65000>"])
    assert prepared(source, tmp_path / "large", tmp_path / "data").dtype == "int32"
    dataset = load(tmp_path / "data")
    assert dataset[0].dtype == np.int32
    assert loaded.convert_tokens_to_ids("<extra_65000>") in dataset[0].tolist()


def test_a_tokenizers_own_truncation_cuts_nothing(tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer), model_max_length=8)
    loaded.backend_tokenizer.enable_truncation(8)
    loaded.backend_tokenizer.enable_padding(length=8)
    loaded.save_pretrained(str(tmp_path / "short"))
    text = "expert " * 100
    manifest = prepared(write(tmp_path / "a.jsonl", [text]), tmp_path / "short", tmp_path / "data")
    assert manifest.tokens == len(expected_documents(tokenizer, [text])[0])


# --- Formats -------------------------------------------------------------------------------------


def hub(tmp_path: Path, texts: Sequence[str]) -> str:
    """A data set's directory, as the hub has it."""
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set", texts)
    return f"hf://{tmp_path / 'set'}"


@pytest.mark.parametrize("make", [compressed, zstandard, parquet, directory, hub])
def test_formats_give_the_same_dataset(
    tokenizer: Path, tmp_path: Path, make: Callable[[Path, Sequence[str]], Path | str]
) -> None:
    texts = many(60)
    manifest = prepared(make(tmp_path, texts), tokenizer, tmp_path / "data", part_bytes=4_000)
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, texts)
    assert manifest.documents + manifest.empty == 60


def test_only_what_was_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    """RedPajama-V2's fields: only the bucket of lowest perplexity."""
    records = [
        {"raw_content": f"text {n}", "bucket": ["head", "middle", "tail"][n % 3], "language": "en"}
        for n in range(9)
    ]
    source = tmp_path / "en_all.json.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    selection = Selection("raw_content", {"bucket": "head", "language": "en"})
    manifest = prepared(source, tokenizer, tmp_path / "data", selection=selection)
    assert (manifest.documents, manifest.left_out) == (3, 6)
    kept = ["text 0", "text 3", "text 6"]
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, kept)


# --- Malformed lines -----------------------------------------------------------------------------

MALFORMED = {
    b'{"text": \n': "not a line of JSON",
    b"\xff\xfe\n": "not a line of JSON in UTF-8",
    b"[1]\n": "expected an object, found list",
    b'{"body": "x"}\n': 'expected a string under "text"',
    b'{"text": 3}\n': 'expected a string under "text"',
    b'{"text": "\\ud800"}\n': "not valid Unicode",
}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_malformed_lines_are_located(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    good = [json.dumps({"text": f"document {n}"}).encode() + b"\n" for n in range(60)]
    content, at = list(good), {}
    for number, line in enumerate(MALFORMED):
        content.insert(number * 10 + 3, line)
        content.insert(number * 10 + 1, b"\n")  # an empty line counts
    whole = b"".join(content)
    for line in MALFORMED:
        at[content.index(line) + 1] = whole.index(line)
    source = tmp_path / f"a.{kind}"
    source.write_bytes(gzip.compress(whole) if kind.endswith("gz") else whole)
    manifest = prepared(source, tokenizer, tmp_path / "data", part_bytes=200, max_malformed=0.1)
    assert (manifest.documents, manifest.malformed) == (60, len(MALFORMED))
    found = [json.loads(x) for x in (tmp_path / "data.malformed.jsonl").read_text().splitlines()]
    assert [(each["line"], each["byte"]) for each in found] == list(at.items())
    assert all(each["file"] == str(source) for each in found)
    for each, message in zip(found, MALFORMED.values(), strict=True):
        assert message in each["error"]


def test_malformed_rows_are_located(tokenizer: Path, tmp_path: Path) -> None:
    texts: list[Any] = [f"document {n}" for n in range(20)]
    texts[4] = texts[17] = None
    source = parquet(tmp_path, texts)
    prepared(source, tokenizer, tmp_path / "data", part_bytes=1, max_malformed=0.2)
    found = [json.loads(x) for x in (tmp_path / "data.malformed.jsonl").read_text().splitlines()]
    assert [each["line"] for each in found] == [5, 18]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": \n{"txt": "a"}\n', r"bad\.jsonl:1: .*2 of 2 lines .* at most 1\.00%"),
        (b'{"text": ""}\n\n', "no document with text"),
        (b"", "no document with text"),
    ],
)
def test_bad_input_leaves_nothing_behind_and_old_data_alone(
    tokenizer: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    out = tmp_path / "out"
    with pytest.raises(UpcyclingError, match=message):
        prepared(bad, tokenizer, out / "data")
    assert not out.exists()
    prepared(write(tmp_path / "a.jsonl", TEXTS), tokenizer, out / "data")
    before = contents(out)
    with pytest.raises(UpcyclingError, match=message):
        prepared(bad, tokenizer, out / "data")
    assert contents(out) == before
    assert len(list(out.iterdir())) == len(before)


def test_a_larger_share_of_malformed_lines_goes_on_from_what_was_read(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", ["a", "b"])
    source.write_bytes(source.read_bytes() + b"{\n")
    with pytest.raises(UpcyclingError, match=r"a\.jsonl:3: .*1 of 3 .* kept in .*data\.parts"):
        prepared(source, tokenizer, tmp_path / "data")
    assert not (tmp_path / "data.idx").exists()
    monkeypatch.setattr("nemo_upcycle.data.preparation.tokenize_part", None)
    manifest = prepared(source, tokenizer, tmp_path / "data", max_malformed=0.5)
    assert (manifest.documents, manifest.malformed) == (2, 1)


def test_a_hub_name_is_a_tokenizer_as_elsewhere(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants
    from typer.testing import CliRunner

    from nemo_upcycle.cli import app
    from tests.tiny import into_hub_cache

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    into_hub_cache(tokenizer, tmp_path / "hub", "some-org/some-model")
    source = write(tmp_path / "a.jsonl", TEXTS)

    def tokenize(name: str) -> Any:
        words = ["data", "tokenize", str(source), "--tokenizer", name]
        return CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--workers", "1"])

    result = tokenize("some-org/some-model")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "a.bin").read_bytes()
    result = tokenize("some-org/another-model")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: no tokenizer directory at some-org/another-model")
    assert "`hf download NAME`" in line


def test_a_nested_field_is_read(tmp_path: Path, tokenizer: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    records = [
        {"a": {"b": {"c": f"text {n}"}}, "a.d": f"other {n}", "m": {"k": n % 2}} for n in range(6)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.PARQUET")
    found = []
    for name in ("a.jsonl", "a.PARQUET"):
        for key in ("a.b.c", "a.d"):
            prefix = tmp_path / f"{name}-{key}"
            selection = Selection(key, {"m.k": "1"})
            manifest = prepare(Preparation((str(tmp_path / name),), tokenizer, prefix, selection))
            assert (manifest.documents, manifest.left_out) == (3, 3)
            found.append(documents_in(prefix))
    assert found[:2] == found[2:]


def test_a_directory_is_read_through_links_and_what_is_not_read_is_said(
    tokenizer: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    (corpus / ".hidden").mkdir(parents=True)
    (corpus / "directory.jsonl").mkdir()
    (tmp_path / "elsewhere").mkdir()
    line = '{"text": "a"}\n'
    for name in ("corpus/a.jsonl", "elsewhere/b.jsonl", "corpus/.hidden/c.jsonl", "corpus/d.txt"):
        (tmp_path / name).write_text(line)
    (corpus / "empty.jsonl").write_text("\n")
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "up").symlink_to(corpus)
    for _ in range(2):  # what the first has written there is not read by the second
        result = tokenized(corpus, tokenizer, corpus, "--name", "web")
        assert result.exit_code == 0
        said = " ".join(result.output.split())
        assert "web: 2 documents" in said
        assert "passed over 1 .txt" in said
        assert f"1 sources gave no document: {corpus}/empty.jsonl" in said
