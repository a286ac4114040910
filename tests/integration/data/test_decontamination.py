"""Contaminated documents are left out of the datasets."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.data.decontamination import (
    words_of,
)
from nemo_upcycle.data.manifest import read_manifest
from nemo_upcycle.data.preparation import Preparation, prepare
from tests.corpora import (
    documents_in,
    expected_documents,
    many,
    write,
)
from tests.evaluation_items import ITEMS, LONG, PADDING, SHORT


@pytest.mark.parametrize("workers", [1, 2])
def test_contaminated_documents_are_left_out_and_located(
    tokenizer: Path, tmp_path: Path, workers: int
) -> None:
    texts = [f"clean document number {n}" for n in range(30)]
    planted = {4: PADDING + LONG, 21: SHORT}
    for line, text in planted.items():
        texts[line] = text
    source = write(tmp_path / "a.jsonl", texts)
    evaluations = tmp_path / "items.jsonl"
    evaluations.write_text("".join(json.dumps(vars(item)) + "\n" for item in ITEMS))
    preparation = Preparation(
        (str(source),), tokenizer, tmp_path / "data", evaluations=evaluations, part_bytes=300
    )
    manifest = prepare(preparation, workers)
    assert (manifest.contaminated, manifest.documents) == (2, 28)
    clean = [text for line, text in enumerate(texts) if line not in planted]
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, clean)
    report = (tmp_path / "data.contaminated.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in report]
    assert [(each["line"], each["task"], each["number"]) for each in found] == [
        (5, "mmlu", 3),
        (22, "piqa", 0),
    ]
    assert found[1]["words"] == SHORT.lower()
    assert read_manifest(tmp_path / "data") == manifest


def command(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make lm-eval's task of real text, and its items."""
    pytest.importorskip("lm_eval")
    root = tmp_path_factory.mktemp("task")
    library = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:100]
    corpus = write(root / "corpus.jsonl", [file.read_text()[:4_000] for file in library])
    command("choices", corpus, "--out", root, "--items", "6")
    command("items", "next_line", "--include-path", root, "--out", root / "items.jsonl")
    return root


@pytest.mark.parametrize("way", ["tokenize", "blend"])
def test_a_planted_item_is_left_out_by_the_commands(
    tokenizer: Path, tmp_path: Path, task: Path, way: str
) -> None:
    """The item is reported, clean text is not, and the manifest's numbers count every line once."""
    item = json.loads((task / "next_line.jsonl").read_text().splitlines()[4])
    asked = item["context"] + item["choices"][item["label"]]
    texts = [text or "x" for text in many(40)]
    texts[29] = f"{PADDING}\n{asked.upper()}\n{PADDING}"
    source = write(tmp_path / "web.jsonl", texts)
    source.write_bytes(source.read_bytes() + b'{"text": ""}\n{"text"\n')
    options = ("--without", task / "items.jsonl", "--max-malformed", "0.1", "--workers", "1",
               "--tokenizer", tokenizer, "--out", tmp_path)  # fmt: skip
    if way == "tokenize":
        command("tokenize", source, *options)
    else:
        blend = tmp_path / "blend.yaml"
        blend.write_text("groups: {web: {datasets: {web: {sources: [web.jsonl]}}}}")
        command("blend", blend, *options)
    (found,) = map(json.loads, (tmp_path / "web.contaminated.jsonl").read_text().splitlines())
    assert (found["task"], found["number"], found["line"]) == ("next_line", 4, 30)
    assert found["words"] in " ".join(words_of(asked))
    assert documents_in(tmp_path / "web") == expected_documents(tokenizer, texts[:29] + texts[30:])
    manifest = read_manifest(tmp_path / "web")
    assert manifest is not None
    counted = (manifest.documents, manifest.contaminated, manifest.empty, manifest.malformed)
    assert counted == (39, 1, 1, 1)
    assert sum(counted) == len(source.read_bytes().splitlines())
    assert manifest.sources[0]["contaminated"] == 1
