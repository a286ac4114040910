"""What is refused before anything is prepared."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcyclingError
from tests.corpora import (
    TEXTS,
    lines,
    many,
    prepared,
    write,
)


def truncated(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(many(50)))[:-20])
    return path


def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(lines(many(50)))
    path.write_bytes(packed[:200] + b"\xff" * 50 + packed[250:])
    return path


def no_parquet(tmp_path: Path) -> Path:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    return tmp_path / "a.parquet"


def no_column(tmp_path: Path) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def no_kind(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text("text\n")
    return tmp_path / "a.csv"


def nothing_in_it(tmp_path: Path) -> Path:
    (tmp_path / "nothing").mkdir()
    return tmp_path / "nothing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, r"a\.jsonl\.gz: cannot be read to its end"),
        (damaged, r"a\.jsonl\.gz: cannot be read to its end: .*decompressing"),
        (no_parquet, r"a\.parquet: not a Parquet file"),
        (no_column, 'no column "text"; it has content'),
        (no_kind, r"a\.csv: expected one of \.jsonl"),
        (nothing_in_it, "no documents in .*nothing"),
        (lambda tmp_path: tmp_path / "missing.jsonl", r"no file .*missing\.jsonl"),
        (lambda tmp_path: "hf:///no/such/set", "cannot be opened"),
        (lambda tmp_path: "hf://json?speed=1", "no option 'speed'"),
    ],
)
def test_what_cannot_be_read_is_one_error(
    tokenizer: Path, tmp_path: Path, make: Callable[[Path], Path | str], message: str
) -> None:
    out, source = tmp_path / "out", make(tmp_path)
    with pytest.raises(UpcyclingError, match=message):
        prepared(source, tokenizer, out / "data")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UpcyclingError, match=message):
        prepared(source, tokenizer, out / "data")
    assert not list(out.iterdir())


def test_missing_tokenizers_are_named(tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = write(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(
        UpcyclingError, match=r"no tokenizer directory at .*gpt2; expected .* Check"
    ):
        prepared(source, tmp_path / "gpt2", tmp_path / "data")
    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    loaded.eos_token = None
    loaded.save_pretrained(str(tmp_path / "without"))
    with pytest.raises(UpcyclingError, match="no eos token"):
        prepared(source, tmp_path / "without", tmp_path / "data")
