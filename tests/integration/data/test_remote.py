"""Files behind URLs, from a real server: the same dataset, whatever the connection does."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nemo_upcycle.data import remote
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import (
    compressed,
    documents_in,
    expected_documents,
    many,
    parquet,
    prepared,
    write,
    zstandard,
)
from tests.file_server import FileServer


def plain(tmp_path: Path, texts: Sequence[str]) -> Path:
    return write(tmp_path / "a.jsonl", texts)


@pytest.mark.parametrize("make", [plain, compressed, zstandard, parquet])
def test_a_url_gives_the_same_dataset(
    tokenizer: Path, tmp_path: Path, server: FileServer, make: Callable[..., Path]
) -> None:
    """In parts; the query of a signed URL is no part of the name."""
    texts = many(60)
    url = f"{server.url}/{make(server.directory, texts).name}?signed=yes"
    manifest = prepared(url, tokenizer, tmp_path / "data", part_bytes=4_000)
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, texts)
    assert manifest.job["sources"] == [{"source": url}]


@pytest.mark.parametrize("make", [plain, compressed, zstandard, parquet])
def test_it_goes_on_where_connections_break(
    tokenizer: Path, tmp_path: Path, server: FileServer, make: Callable[..., Path]
) -> None:
    texts = many(400)
    path = f"/{make(server.directory, texts).name}"
    # Twice it ends early, then the server is busy, then it breaks again.
    server.faults[path] = [-1_000, -500, 503, -1_500]
    prepared(f"{server.url}{path}", tokenizer, tmp_path / "data")
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, texts)
    assert not server.faults[path]
    assert any(start for _, _, start in server.asked)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([503, 503, 503, 503], "HTTP Error 503"),
        ([403], "HTTP Error 403"),
        ([404], r"there is no such file \(HTTP 404\)"),
        ([-100, 3.0, 3.0, 3.0], "timed out"),
    ],
)
def test_what_does_not_end_well_is_one_error(
    tokenizer: Path,
    tmp_path: Path,
    server: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    faults: list[int | float],
    message: str,
) -> None:
    if 3.0 in faults:
        monkeypatch.setattr(remote, "TIMEOUT_S", 1.0)
    plain(server.directory, many(60))
    server.faults["/a.jsonl"] = faults
    url = f"{server.url}/a.jsonl"
    with pytest.raises(UpcyclingError, match=f"{url} cannot be read: .*{message}.*curl -C"):
        prepared(url, tokenizer, tmp_path / "out" / "data")
    assert not (tmp_path / "out").exists()
    assert not server.faults["/a.jsonl"]
    prepared(url, tokenizer, tmp_path / "out" / "data")  # the same command goes on
