"""Files behind URLs that cannot be read to their end."""

from pathlib import Path

import pytest

from nemo_upcycle.data import remote
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import (
    compressed,
    many,
    prepared,
    write,
)
from tests.file_server import FileServer


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
