"""RedPajama-V2 through the commands."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.data.manifest import read_manifest
from tests.corpora import documents_in, expected_documents
from tests.file_server import FileServer
from tests.redpajama import HEADS, text_of

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
    yaml.write_text(BLEND.format(base="served" if local else server.url))
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
    """What was tokenized of a server's files is not asked for again."""
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
