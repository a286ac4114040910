"""Random JSON lines: what Python's `json` reads is read, the rest is located, nothing is lost.

`UPCYCLE_FUZZ=1000 pytest tests/integration/data/test_fuzz.py` runs as many seeds.
"""

import codecs
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.encoder import load_encoder
from nemo_upcycle.data.manifest import Manifest
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import tokenized
from tests.tokenizers import write_tokenizer

SEEDS = int(os.environ.get("UPCYCLE_FUZZ", "60"))

SUFFIXES = (".jsonl", ".JSONL", ".json", ".ndjson", ".jsonl.gz", ".JSON.GZ", ".jsonl.zst")

PIECES = (
    *("a", "expert ", "\n", "\t", "\0", "\u2028", "日本", "é", "e\u0301", "🚀", "\ufeff", "\x85"),
    *("</s>", "<tool_call>", '"', "\\", "\r", "{", "\x7f", "\U0010ffff", " " * 9),
)


@dataclass(frozen=True)
class Line:
    """A line and what is to become of it: its text, or None where it is no document."""

    content: bytes
    text: str | None


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.choice([0, 1, 2, 9, 60, 3000])))


def good(rng: random.Random) -> Line:
    text = random_text(rng)
    record: dict[str, Any] = {"id": rng.choice([1, None, -0.0, 1e400, [], {"text": 3}])}
    record["text"] = text
    items = list(record.items())
    rng.shuffle(items)
    line = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.2:  # the last of equal keys counts
        line = '{"text": "first", ' + json.dumps({"text": text})[1:]
    if rng.random() < 0.2:
        line = rng.choice([" ", "\t", "\r"]) + line + rng.choice(["  ", "\t"])
    return Line(line.encode(), text)


def blank(rng: random.Random) -> Line:
    return Line(rng.choice([b"", b" ", b"\t ", b"\r"]), "")


def bad(rng: random.Random) -> Line:
    line = good(rng).content
    ways: list[Callable[[], bytes]] = [
        lambda: line.rstrip()[:-1],
        lambda: line + b"x",
        lambda: b'{"text": "\xff"}',
        lambda: '{"text": "é"}'.encode("latin-1"),
        lambda: b'{"text": "a\0b"}',
        lambda: b'{"text": "\\ud83d"}',
        lambda: b'{"text": 3}',
        lambda: b'{"text": null}',
        lambda: b'{"text": {"text": "nested"}}',
        lambda: b'{"body": "x"}',
        lambda: b'["text"]',
        lambda: b"NaN",
        lambda: b"[" * 100_000,
        lambda: b"1" * 5_000,
        lambda: bytes(rng.randrange(11, 256) for _ in range(40)).replace(b"\r", b"") + b"\xff",
        lambda: "x".encode("utf-16"),
    ]
    return Line(rng.choice(ways)(), None)


def random_lines(rng: random.Random) -> list[Line]:
    kinds = rng.choices([good, blank, bad], [8, 1, rng.choice([0, 1])], k=rng.randint(1, 40))
    lines = [kind(rng) for kind in kinds]
    return [
        Line(codecs.BOM_UTF8 + line.content, line.text)
        if number == 0 or rng.random() < 0.05
        else line
        for number, line in enumerate(lines)
    ] if rng.random() < 0.4 else lines  # fmt: skip


def write(path: Path, content: bytes) -> Path:
    if path.suffix.lower() == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        import pyarrow

        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "BPE", "BPE")


def prepared(source: Path, tokenizer: Path, prefix: Path, part_bytes: int) -> Manifest:
    given = Preparation((str(source),), tokenizer, prefix, max_malformed=1.0, part_bytes=part_bytes)
    return prepare(given)


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_random_lines(tokenizer: Path, tmp_path: Path, first: int) -> None:
    for seed in range(first, min(first + 20, SEEDS)):
        directory = tmp_path / str(seed)
        directory.mkdir()
        check(random.Random(seed), tokenizer, directory)


def check(rng: random.Random, tokenizer: Path, directory: Path) -> None:
    lines = random_lines(rng)
    for line in lines:  # what json reads is what is expected
        assert line.text is None or not line.text or json.loads(line.content)["text"] == line.text
    end = rng.choice([b"\n", b"\r\n"])
    last = end if rng.random() < 0.7 else b""
    content = end.join(line.content for line in lines) + last
    if not last and not lines[-1].content:
        lines = lines[:-1]  # nothing after the last end is no line
    source = write(directory / f"a{rng.choice(SUFFIXES)}", content)
    texts = [line.text for line in lines if line.text]
    encoder = load_encoder(tokenizer)
    expected = [[*ids, encoder.eos] for ids in encoder.tokens(texts) if ids]
    sizes = [1, rng.randint(2, 5_000), 10**9]
    if not expected:
        for size in sizes:
            with pytest.raises(UpcyclingError):
                prepared(source, tokenizer, directory / f"{size}", size)
        return
    found = {size: prepared(source, tokenizer, directory / f"{size}", size) for size in sizes[1:]}
    small = found[sizes[1]]
    assert small.documents + small.empty + small.left_out + small.malformed == len(lines)
    assert documents_of(directory / f"{sizes[1]}") == expected
    assert located(directory / f"{sizes[1]}") == places(lines, end)
    for suffix in (".bin", ".idx"):
        assert len({(directory / f"{size}{suffix}").read_bytes() for size in sizes[1:]}) == 1


def documents_of(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def located(prefix: Path) -> list[tuple[int, int]]:
    file = prefix.with_name(f"{prefix.name}.malformed.jsonl")
    said = file.read_text().splitlines() if file.exists() else []
    return [(each["line"], each["byte"]) for each in map(json.loads, said)]


def places(lines: list[Line], end: bytes) -> list[tuple[int, int]]:
    found, at = [], 0
    for number, line in enumerate(lines, 1):
        if line.text is None:
            found.append((number, at))
        at += len(line.content) + len(end)
    return found


# --- Which field ---------------------------------------------------------------------------------


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
            found.append(documents_of(prefix))
    assert found[:2] == found[2:]


# --- Where nothing can be written ----------------------------------------------------------------


# --- What users give by mistake ------------------------------------------------------------------


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


# --- Where nothing may be left -------------------------------------------------------------------


FULL = """
import resource, signal, sys
from pathlib import Path
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.errors import UpcyclingError
source, tokenizer, prefix, part_bytes = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    prepare(Preparation((source,), Path(tokenizer), Path(prefix), part_bytes=int(part_bytes)))
except UpcyclingError as error:
    print(error)
"""


@pytest.mark.parametrize(("part_bytes", "kept"), [(10**9, False), (10_000, True)])
def test_a_full_disk_keeps_complete_parts_alone(
    tokenizer: Path, tmp_path: Path, part_bytes: int, kept: bool
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"{n} expert " * 20}) + "\n" for n in range(300)))
    prefix = tmp_path / "out" / "data"
    words = [sys.executable, "-c", FULL, str(source), str(tokenizer), str(prefix), str(part_bytes)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "File too large" in said
    assert "the same command goes on" in said
    names = {path.name for path in tmp_path.glob("out/.data.parts/*")}
    assert ("000000.json" in names) == kept
    assert not [name for name in names if name.startswith("new") or name.endswith(".partial")]
    assert prefix.parent.exists() == kept
    prepare(Preparation((str(source),), tokenizer, prefix, part_bytes=part_bytes))
    assert len(list(prefix.parent.iterdir())) == 3


# --- Processes -----------------------------------------------------------------------------------


def begun(tokenizer: Path, tmp_path: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the command with two processes and return it once the first has begun."""
    source = tmp_path / "a.jsonl"
    source.write_text((json.dumps({"text": "expert dense " * 300}) + "\n") * 10_000)
    words = ["data", "tokenize", str(source), "--workers", "2"]
    words += ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_upcycle.cli", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    while not list(tmp_path.glob("out/.a.parts/*.partial")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    return process, log


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line(tokenizer: Path, tmp_path: Path) -> None:
    process, log = begun(tokenizer, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert log.read_text().splitlines()[-1] == "Error: interrupted."
    assert "Traceback" not in log.read_text()
    assert not list(tmp_path.glob("out/.a.parts/*.partial"))


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line(tokenizer: Path, tmp_path: Path) -> None:
    """As the kernel does where memory is short."""
    process, log = begun(tokenizer, tmp_path)
    partial = next(tmp_path.glob("out/.a.parts/*.partial"))
    os.kill(int(partial.name.split(".")[1]), signal.SIGKILL)
    assert process.wait(60) == 1
    said = " ".join(log.read_text().split())
    assert "A process that tokenises was killed" in said
    assert "Traceback" not in said
