"""From documents to Megatron's dataset: the same whatever the format, the processes, the kills."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data import parts
from nemo_upcycle.data.manifest import check_files, read_manifest
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


# --- Going on ------------------------------------------------------------------------------------


def test_progress_ends_at_the_size_and_the_tokens(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 30)
    source = write(tmp_path / "a.jsonl", TEXTS * 3)
    calls: list[tuple[int, int, int]] = []
    preparation = Preparation((str(source),), tokenizer, tmp_path / "data")
    manifest = prepare(preparation, 1, lambda *call: calls.append(call))
    size = source.stat().st_size
    assert len(calls) > 3
    assert calls == sorted(set(calls))
    assert calls[-1] == (size, size, manifest.tokens)


def test_what_is_done_is_not_done_again(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    first = prepared(source, tokenizer, tmp_path / "data")
    monkeypatch.setattr("nemo_upcycle.data.preparation.tokenize_part", None)
    again = prepared(source, tokenizer, tmp_path / "data")
    assert again == first == read_manifest(tmp_path / "data")


def test_other_input_replaces(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["one text"])
    prepared(source, tokenizer, tmp_path / "data")
    write(source, ["two text"])  # as long
    os.utime(source, ns=(1, 1))
    prepared(source, tokenizer, tmp_path / "data")
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, ["two text"])


def test_complete_parts_are_kept_after_a_failure(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", many(100))
    made: list[int] = []
    real = parts.tokenize_part

    def fail_at_third(part: Any, files: Any, *rest: Any) -> Any:
        if len(made) == 2:
            raise UpcyclingError("no more")
        made.append(files.number)
        return real(part, files, *rest)

    monkeypatch.setattr("nemo_upcycle.data.preparation.tokenize_part", fail_at_third)
    with pytest.raises(UpcyclingError, match="no more"):
        prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert made == [0, 1]
    assert not (tmp_path / "data.idx").exists()

    def go_on(part: Any, files: Any, *rest: Any) -> Any:
        made.append(files.number)
        return real(part, files, *rest)

    monkeypatch.setattr("nemo_upcycle.data.preparation.tokenize_part", go_on)
    prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert made == sorted(set(made))
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, many(100))


def leave_parts(tokenizer: Path, source: Path, prefix: Path) -> Path:
    """Prepare, and put the parts back as a kill just before the end would leave them."""
    import shutil

    kept = prefix.with_name("kept")
    real = shutil.rmtree
    try:
        shutil.rmtree = lambda path, **_: os.replace(path, kept)  # type: ignore[assignment]
        prepared(source, tokenizer, prefix, part_bytes=5_000)
    finally:
        shutil.rmtree = real
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        path.unlink()
    work = prefix.with_name(f".{prefix.name}.parts")
    os.replace(kept, work)
    return work


def test_a_damaged_part_is_noticed_and_made_anew(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    damaged = work / "000001.bin"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    with pytest.raises(UpcyclingError, match=r"000001\.bin is not what was written"):
        prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, many(100))


def test_parts_of_another_job_are_left_alone(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    before = contents(work)
    with pytest.raises(UpcyclingError, match="holds parts of another job"):
        prepared(source, tokenizer, tmp_path / "data", part_bytes=4_000)
    assert contents(work) == before


@pytest.mark.parametrize("said", [None, "", '{"format": 1, "sour'])
def test_parts_of_nobody_knows_what_are_not_taken(
    tokenizer: Path, tmp_path: Path, said: str | None
) -> None:
    """As a kill leaves them while they are removed, or before it is said what they are of."""
    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    (work / "job.json").unlink()
    if said is not None:
        (work / "job.json").write_text(said)
    other = write(tmp_path / "b.jsonl", many(100, seed=1))
    prepared(other, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, many(100, seed=1))


def test_two_at_once_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    import fcntl

    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    with (work / "job.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UpcyclingError, match="Another process is at work"):
            prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)


def test_checksums(tokenizer: Path, tmp_path: Path) -> None:
    manifest = prepared(write(tmp_path / "a.jsonl", TEXTS), tokenizer, tmp_path / "data")
    for name, each in manifest.files.items():
        content = (tmp_path / name).read_bytes()
        assert each == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert check_files(tmp_path / "data") == manifest
    tokens = (tmp_path / "data.bin").read_bytes()
    (tmp_path / "data.bin").write_bytes(b"\1" + tokens[1:])
    with pytest.raises(UpcyclingError, match=r"data\.bin: its sha256 is not the manifest's"):
        check_files(tmp_path / "data")
    (tmp_path / "data.bin").write_bytes(tokens[1:])
    with pytest.raises(UpcyclingError, match="no complete dataset"):
        check_files(tmp_path / "data")


SCRIPT = """
import sys
from pathlib import Path
from nemo_upcycle.data.preparation import Preparation, prepare
source, tokenizer, prefix = sys.argv[1:]
if __name__ == "__main__":
    print("begun", flush=True)
    prepare(Preparation((source,), Path(tokenizer), Path(prefix), part_bytes=40_000), workers=2)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_ten_moments_the_files_are_the_same(tokenizer: Path, tmp_path: Path) -> None:
    """SIGKILL for it and its processes; each time the same command goes on."""
    source = write(tmp_path / "a.jsonl", many(8_000))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    calm, wild = (tmp_path / name / "data" for name in ("calm", "wild"))

    def start(prefix: Path) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), str(source), str(tokenizer), str(prefix)]
        return subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE, text=True)

    started = time.monotonic()
    assert start(calm).communicate()[0].endswith("done\n")
    whole = time.monotonic() - started
    rng, kills = random.Random(7), 0
    for _ in range(10):
        process = start(wild)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.7) * whole)
        if process.poll() is None:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert start(wild).communicate()[0].endswith("done\n")
    assert kills >= 5
    assert contents(wild.parent) == contents(calm.parent)
    assert len(list(wild.parent.iterdir())) == 3
