"""Which files a source is, and what is said of files that are none."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.sources import files_of, name_of
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import (
    TEXTS,
    directory,
    tokenized,
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x", "--name is '../x', with /;"),
        ("", "--name is '', empty;"),
        ("..", "--name is '..', which leads elsewhere;"),
        (".x", "--name is '.x', which hides the files;"),
        ("x ", "--name is 'x ', with spaces around it;"),
        ("a\nb", "with characters that cannot be printed"),
        ("x" * 201, "of more than 200 bytes"),
    ],
)
def test_a_name_is_a_files(tokenizer: Path, tmp_path: Path, name: str, message: str) -> None:
    source = tmp_path / "in" / "a.jsonl"
    source.parent.mkdir()
    source.write_text('{"text": "a"}\n')
    result = tokenized(source, tokenizer, tmp_path / "out", "--name", name)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    blend = tmp_path / "in" / "blend.yaml"
    datasets = {name: {"sources": ["a.jsonl"]}}
    blend.write_text(json.dumps({"groups": {"web": {"datasets": datasets}}}))
    result = CliRunner().invoke(
        app, ["data", "blend", str(blend), "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    )
    assert result.exit_code == 1
    assert message.removeprefix("--name is ") in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_source_without_a_name_needs_one(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    result = tokenized(".", tokenizer, tmp_path / "out")
    assert "Give a --name: . makes a dataset called ''" in result.output


ANOTHER_ENDING = {
    "a.txt": "with each file as one: python -c",
    "a.md": "with each file as one: python -c",
    "a.jsonl.bz2": "Unpack it, or pack JSON lines with gzip or zstd for `data tokenize`",
    "a.csv": "hf://DIRECTORY of `data tokenize` reads a directory of .csv files",
    "a.foo": 'JSON lines are documents such as {"text": "…"}, one per line',
}


@pytest.mark.parametrize("name", ANOTHER_ENDING)
def test_a_file_of_another_ending_is_told_what_to_do(
    tokenizer: Path, tmp_path: Path, name: str
) -> None:
    directory = tmp_path / "corpus"
    directory.mkdir()
    (directory / name).write_text("x")
    trained = ["data", "tokenizer", str(directory / name), "--out", str(tmp_path / "out")]
    results = [
        tokenized(source, tokenizer, tmp_path / "out") for source in (directory / name, directory)
    ]
    for result in (CliRunner().invoke(app, trained), *results):
        assert result.exit_code == 1
        assert ANOTHER_ENDING[name] in " ".join(result.output.split())
    assert f"no documents in {directory}: 1 .{name.split('.')[-1]};" in result.output
    assert not (tmp_path / "out").exists()


def test_what_is_said_of_plain_text_makes_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('two\n"lines"\n')
    with pytest.raises(UpcyclingError) as error:
        files_of([str(tmp_path / "a.txt")])
    command = str(error.value).partition("as one: ")[2].replace("FILES", "a.txt")
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "documents.jsonl").read_text()) == {"text": 'two\n"lines"\n'}


@pytest.mark.parametrize("again", ["a.jsonl", "link.jsonl", "."])
def test_a_file_that_is_given_twice_is_refused(tmp_path: Path, again: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(UpcyclingError, match="is given twice"):
        files_of([str(tmp_path / "a.jsonl"), str(tmp_path / again)])


def test_a_link_to_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UpcyclingError, match=r"a\.jsonl: links to no file"):
            files_of([str(source)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[\n", "jq -c '.[]' FILE writes one per line"),
        (b"{\n", "jq -c . FILE writes one per line"),
        ('{"text": "a"}\n'.encode("utf-16"), "it is UTF-16: iconv"),
        (b'[{"text": "a"}]\n', "jq -c '.[]' FILE writes one per line"),
    ],
)
def test_json_that_is_no_lines_is_told_what_to_do(
    tokenizer: Path, tmp_path: Path, line: bytes, message: str
) -> None:
    (tmp_path / "a.json").write_bytes(line)
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        prepare(Preparation((str(tmp_path / "a.json"),), tokenizer, tmp_path / "data"))


def test_nothing_is_made_where_one_of_several_sources_is_bad(
    tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    result = tokenized(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", str(tmp_path / "b.txt"))
    assert "no file" in result.output
    assert not (tmp_path / "out").exists()


def test_a_directory_is_read_by_name(tmp_path: Path) -> None:
    corpus = directory(tmp_path, TEXTS)
    names = [Path(name).name for name in files_of([str(corpus)])]
    assert names == ["a.jsonl", "b.json"]


def test_sources_of_one_name_are_not_written_over_each_other(
    tokenizer: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from nemo_upcycle.cli import app

    sources = [f"hf://allenai/ai2_arc?config=ARC-{kind}" for kind in ("Easy", "Challenge")]
    words = ["data", "tokenize", *sources, "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "2 sources are called ai2_arc; expected a name per dataset" in result.output


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("crawl/", "crawl"),
        ("/data/web.jsonl.zst", "web"),
        ("https://host/web.json.gz?signed=a/b", "web"),
        ("hf://cais/mmlu?config=all", "mmlu"),
        ("redpajama-v2://?snapshots=2023-06", "redpajama-v2"),
        ("redpajama-v2:///data/rpv2?snapshots=2023-06", "rpv2"),
    ],
)
def test_names_of_sources(source: str, name: str) -> None:
    assert name_of(source) == name
