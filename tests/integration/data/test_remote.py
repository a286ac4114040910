"""Files behind URLs, from a real server: the same dataset, whatever the connection does."""

from collections.abc import Callable, Iterator, Sequence
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
from tests.file_server import FileServer, serve


def plain(tmp_path: Path, texts: Sequence[str]) -> Path:
    return write(tmp_path / "a.jsonl", texts)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0, 0.0))
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as server:
        yield server


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


def test_a_file_that_is_always_short_is_an_error(
    tokenizer: Path, tmp_path: Path, server: FileServer
) -> None:
    """Where the server sends no parts, what is missing cannot be asked for."""
    server.ranges = False
    compressed(server.directory, many(60))
    server.faults["/a.jsonl.gz"] = [-100]
    with pytest.raises(UpcyclingError, match="cannot begin in the middle of a file"):
        prepared(f"{server.url}/a.jsonl.gz", tokenizer, tmp_path / "out" / "data")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_is_an_error(tmp_path: Path, server: FileServer) -> None:
    write(server.directory / "a.jsonl", ["text"] * 100)
    with remote.open_url(f"{server.url}/a.jsonl") as file:
        write(server.directory / "a.jsonl", ["text"] * 50)
        with pytest.raises(UpcyclingError, match="it changed while it was read"):
            file.read()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{server}/missing.jsonl", r"missing\.jsonl cannot be read: there is no such file"),
        ("{server}/a.csv", r"expected one of \.jsonl"),
        ("http://127.0.0.1:9/a.jsonl", "Connection refused"),
    ],
)
def test_bad_urls_are_one_error(
    tokenizer: Path, tmp_path: Path, server: FileServer, url: str, message: str
) -> None:
    with pytest.raises(UpcyclingError, match=message):
        prepared(url.format(server=server.url), tokenizer, tmp_path / "out" / "data")
    assert not (tmp_path / "out").exists()
