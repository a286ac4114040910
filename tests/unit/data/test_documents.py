"""Documents are read in parts, each of them once."""

import json
import random
from pathlib import Path

import pytest

from nemo_upcycle.data.documents import parts_of, read_part
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import (
    lines,
    many,
    prepared,
    write,
)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_what_is_packed_and_cut_off_is_located(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    """At any byte: an error, never fewer documents."""
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh \n", k=300)) for _ in range(300)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    whole = write(tmp_path / f"whole.jsonl.{kind}", content).read_bytes()
    for cut in (3, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        source = tmp_path / f"cut.jsonl.{kind}"
        source.write_bytes(whole[:cut])
        with pytest.raises(UpcyclingError, match=rf"cut\.jsonl\.{kind}: cannot be read to its end"):
            prepared(source, tokenizer, tmp_path / f"cut{cut}", 10**9)


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 10_000])
def test_every_line_is_in_one_part(tmp_path: Path, part_bytes: int) -> None:
    texts = [text[:50] for text in many(40)]
    source = write(tmp_path / "a.jsonl", texts)
    found = [
        document.text
        for part in parts_of(str(source), part_bytes)
        for document in read_part(part, Selection())
    ]
    assert found == texts


def test_a_last_line_without_an_end_counts(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines(["a", "b"]).rstrip())
    found = [d.text for p in parts_of(str(source), 5) for d in read_part(p, Selection())]
    assert found == ["a", "b"]
