"""RedPajama-V2: the bucket that was asked for, from a server or a directory of its layout."""

from pathlib import Path

import pytest

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.redpajama import TOGETHER, excerpt
from nemo_upcycle.data.sources import files_of
from nemo_upcycle.errors import UpcyclingError
from tests.file_server import FileServer
from tests.redpajama import HEADS, record


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
