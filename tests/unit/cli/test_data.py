"""`nemo-upcycle data`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app


@pytest.mark.parametrize(
    "command", ["sample", "tokenizer", "tokenize", "blend", "items", "choices"]
)
def test_an_output_that_cannot_be_written_is_one_line(
    tokenizer: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n')
    (tmp_path / "blend.yaml").write_text("groups: {web: {datasets: {web: {sources: [a.jsonl]}}}}")
    words = {
        "tokenizer": [str(source), "--vocab-size", "300"],
        "tokenize": [str(source), "--tokenizer", str(tokenizer)],
        "blend": [str(tmp_path / "blend.yaml"), "--tokenizer", str(tokenizer)],
        "items": ["piqa"],
        "choices": [str(source)],
    }
    out = ["--out", str(tmp_path / "file" / "out" / "x")]
    result = CliRunner().invoke(app, ["data", command, *words.get(command, []), *out])
    assert result.exit_code == 1
    assert "cannot be written to: Not a directory" in " ".join(result.output.split())
