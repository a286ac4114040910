"""RedPajama-V2: the bucket that was asked for, from a server or a directory of its layout."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.data import remote
from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.manifest import read_manifest
from nemo_upcycle.data.redpajama import LOST, TOGETHER, excerpt
from nemo_upcycle.data.sources import files_of
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import documents_in, expected_documents
from tests.file_server import FileServer, serve

SNAPSHOTS, SHARDS = ("2014-52", "2023-06"), (0, 1, 2811)


def record(text: str, bucket: str) -> dict[str, Any]:
    """Return a document with the fields that the data set has."""
    return {
        "url": "http://example.org/page",
        "date_download": "2023-01-26T21:25:04Z",
        "digest": "sha1:YXO4ZXXMWHWZNOYRLVEC7D4V3VFAKWXQ",
        "length": len(text),
        "nlines": 1,
        "source_domain": "example.org",
        "title": "A page",
        "raw_content": text,
        "cc_segment": "crawl-data/CC-MAIN-2023-06/segments/1/wet/CC-MAIN-1-00000.warc.wet.gz",
        "original_nlines": 3,
        "original_length": 2 * len(text),
        "line_ids": [1],
        "language": "en",
        "language_score": 0.97,
        "perplexity": 211.4,
        "bucket": bucket,
    }


def text_of(name: str) -> str:
    return f"Document of {name}."


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """Write two snapshots of three shards, listed as on the server; one file is lost there."""
    root = tmp_path / "redpajama"
    for snapshot in SNAPSHOTS:
        names = [f"{snapshot}/{shard:04}/en_{bucket}"
                 for shard in SHARDS for bucket in ("head", "middle")]  # fmt: skip
        for name in names:
            if name in LOST:
                continue
            file = root / "documents" / f"{name}.json.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            bucket = name.partition("_")[2]
            # The second should not be there: the file's name says otherwise.
            records = [record(text_of(name), bucket), record("strayed", "tail")]
            lines = "".join(json.dumps(each) + "\n" for each in records)
            file.write_bytes(gzip.compress(lines.encode()))
        (root / "listings").mkdir(exist_ok=True)
        listing = root / "listings" / f"en-{snapshot}-head_middle.txt"
        listing.write_text("".join(f"{name}\n" for name in names))
    return root


@pytest.fixture
def server(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0, 0.0))
    with serve(data_set) as server:
        yield server


HEADS = ["2014-52/0000", "2014-52/0001", "2023-06/0000", "2023-06/0001", "2023-06/2811"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("snapshots=2014-52,2023-06", HEADS),
        ("snapshots=2023-06,2014-52", HEADS[2:] + HEADS[:2]),
        ("snapshots=2023-06&shards=0-1", HEADS[2:4]),
        ("snapshots=2023-06&shards=2811", HEADS[4:]),
        ("snapshots=2014-52&shards=1", HEADS[1:2]),
    ],
)
def test_files_of_the_head_bucket(
    data_set: Path, server: FileServer, options: str, expected: list[str]
) -> None:
    """The same from the server and from a directory; what is listed and lost is not asked for."""
    for base in (server.url, str(data_set)):
        found = files_of([f"redpajama-v2://{base}?{options}"])
        assert found == [f"{base}/documents/{shard}/en_head.json.gz" for shard in expected]


def test_other_buckets(data_set: Path) -> None:
    (found,) = files_of([f"redpajama-v2://{data_set}?snapshots=2023-06&bucket=middle&shards=0"])
    assert found.endswith("documents/2023-06/0000/en_middle.json.gz")


def test_it_is_togethers_server_unless_said() -> None:
    assert excerpt("redpajama-v2://?snapshots=2023-06").base == TOGETHER


BLEND = """
base: llama3_moe
directory: prepared
groups:
  web:
    datasets:
      redpajama_v2:
        sources: ["redpajama-v2://{base}?snapshots=2014-52,2023-06"]
"""


@pytest.mark.parametrize("local", [True, False])
def test_the_papers_blend_reads_it(
    tokenizer: Path, data_set: Path, server: FileServer, local: bool
) -> None:
    """By its shipped settings, from a mirror or a directory: only what is of the bucket."""
    yaml = data_set.parent / "mine.yaml"
    yaml.write_text(BLEND.format(base="redpajama" if local else server.url))
    words = ["data", "blend", str(yaml), "--only", "redpajama_v2", "--tokenizer", str(tokenizer)]
    result = CliRunner().invoke(app, [*words, "--workers", "1"])
    assert result.exit_code == 0, result.output
    prefix = data_set.parent / "prepared" / "redpajama_v2"
    texts = [text_of(f"{shard}/en_head") for shard in HEADS]
    assert documents_in(prefix) == expected_documents(tokenizer, texts)
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert (manifest.documents, manifest.left_out, len(manifest.sources)) == (5, 5, 5)


def test_a_killed_download_goes_on(
    tokenizer: Path, tmp_path: Path, data_set: Path, server: FileServer
) -> None:
    """What was tokenised of a server's files is not asked for again."""
    source = f"redpajama-v2://{server.url}?snapshots=2014-52"
    path = "/documents/2014-52/0001/en_head.json.gz"
    server.faults[path] = [-10, 500, 500, 500]
    words = ["data", "tokenize", source, "--name", "web", "--text-key", "raw_content", "--workers",
             "1", "--tokenizer", str(tokenizer), "--out", str(tmp_path)]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert f"{server.url}{path} cannot be read: HTTP Error 500" in result.output
    assert not (tmp_path / "web.bin").exists()
    server.asked.clear()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert [name for method, name, _ in server.asked if method == "GET" and "head" in name] == [
        "/listings/en-2014-52-head_middle.txt",
        path,
    ]
    assert len(documents_in(tmp_path / "web")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", r"expected redpajama-v2://\[BASE\]\?snapshots=2023-06"),
        ("snapshots=2023", "expected redpajama-v2"),
        ("snapshots=2023-06&bucket=heads", "&bucket= one of head, middle, tail"),
        ("snapshots=2023-06&language=nl", "&language= one of en, de, fr, es, it"),
        ("snapshots=2023-06&speed=1", "expected redpajama-v2"),
        ("snapshots=2023-06&shards=9-1", "shards=9-1: expected a number, or two"),
        ("snapshots=2023-06&shards=0-3", r"2 of 4 shards .*2023-06/0002/en_head, 2023-06/0003"),
    ],
)
def test_mistakes_are_one_error(data_set: Path, options: str, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        files_of([f"redpajama-v2://{data_set}?{options}"])


def test_a_snapshot_that_is_not_there(data_set: Path, server: FileServer) -> None:
    with pytest.raises(UpcyclingError, match=r"no documents/2022-49/\*/en_head\.json\.gz"):
        files_of([f"redpajama-v2://{data_set}?snapshots=2022-49"])
    with pytest.raises(UpcyclingError, match=r"en-2022-49-head_middle\.txt .*no such file"):
        files_of([f"redpajama-v2://{server.url}?snapshots=2022-49"])


def test_the_shipped_blend_asks_for_the_head_bucket_alone() -> None:
    web = read_blend("llama3_moe").datasets[0]
    (source,) = web.sources
    asked = excerpt(source)
    assert (asked.base, asked.language, asked.bucket) == (TOGETHER, "en", "head")
    assert web.selection.where == {"bucket": "head", "language": "en"}
    assert web.selection.text_key in record("", "head")
