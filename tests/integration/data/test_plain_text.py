"""What the preparation makes of texts that spell special tokens."""

import json
from pathlib import Path

import pytest

from nemo_upcycle.checkpoint.tokenizer_files import load_tokenizer
from nemo_upcycle.data.preparation import Preparation, prepare
from tests.tokenizers import write_tokenizer

SPELLED = ["see </s> in the vocabulary", "</s>", "<s>see<unk> the</s></s>", "a </s", "end</s>\n"]


PLAIN = ["see the end", " two  experts.", "", "x<tool_call>y <tool_call> z", "日本"]


@pytest.mark.parametrize("parse_special", [False, True])
def test_the_manifest_counts_them(tmp_path: Path, parse_special: bool) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "BPE")
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in SPELLED + PLAIN))
    preparation = Preparation(
        (str(source),), tokenizer, tmp_path / "data", parse_special=parse_special
    )
    manifest = prepare(preparation)
    assert manifest.spelled == 7
    assert manifest.job["parse_special"] == parse_special
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(tmp_path / "data"))
    loaded = load_tokenizer(tokenizer)
    ends = sum((dataset[i] == loaded.eos_token_id).sum() for i in range(len(dataset)))
    assert ends == len(dataset) + (5 if parse_special else 0)
    largest = max(int(dataset[i].max()) for i in range(len(dataset)))
    assert manifest.largest_id == largest


def test_the_command_says_what_it_made_of_them(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nemo_upcycle.cli import app

    tokenizer = write_tokenizer(tmp_path / "tokenizer", "BPE")
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": SPELLED[0]}) + "\n")
    words = ["data", "tokenize", str(source), "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    said = CliRunner().invoke(app, words).output
    assert "1 spelled special tokens are text: --parse-special" in said
    said = CliRunner().invoke(app, [*words, "--parse-special"]).output
    assert "1 spelled special tokens are taken for them" in said
