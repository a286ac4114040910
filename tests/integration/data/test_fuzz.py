"""Random JSON lines: what Python's `json` reads is read, the rest is located, nothing is lost.

`UPCYCLE_FUZZ=1000 pytest tests/integration/data/test_fuzz.py` runs as many seeds.
"""

import codecs
import gzip
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.encoder import load_encoder
from nemo_upcycle.data.manifest import Manifest
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import documents_in
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
    assert documents_in(directory / f"{sizes[1]}") == expected
    assert located(directory / f"{sizes[1]}") == places(lines, end)
    for suffix in (".bin", ".idx"):
        assert len({(directory / f"{size}{suffix}").read_bytes() for size in sizes[1:]}) == 1


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
