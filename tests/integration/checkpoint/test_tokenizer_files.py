"""Processes that load tokenizers."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nemo_upcycle.checkpoint.tokenizer_files import (
    load_alone,
)
from tests.tokenizers import change_config, write_tokenizer

KILLED = """
import os, sys
from pathlib import Path
from nemo_upcycle.checkpoint.tokenizer_files import load_alone
load_alone(Path(sys.argv[1]))
os._exit(1)
"""


@pytest.mark.thorough
def test_processes_that_are_killed_leave_one_directory_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a cleaner of temporary files, or a full disk, has taken of it is put back."""
    directory, temporary = write_tokenizer(tmp_path / "tokenizer", "BPE"), tmp_path / "tmp"
    temporary.mkdir()
    for _ in range(2):
        environment = os.environ | {"TMPDIR": str(temporary)}
        subprocess.run([sys.executable, "-c", KILLED, directory], env=environment, check=False)
    (left,) = temporary.iterdir()
    files = {path.name: path.read_bytes() for path in (left / "tokenizer").iterdir()}
    (left / "tokenizer" / "tokenizer.json").write_text("{")
    (left / "tokenizer" / "tokenizer_config.json").unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert load_alone(directory)[1] == left / "tokenizer"
    assert files == {path.name: path.read_bytes() for path in (left / "tokenizer").iterdir()}
    assert [path.name for path in left.iterdir()] == ["tokenizer"]


def test_the_end_of_a_turn_is_told_by_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nemo_upcycle.cli import app

    chat = write_tokenizer(tmp_path / "chat", "BPE", added=("<|im_end|>",))
    change_config(chat, eos_token="<|im_end|>")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    words = ["data", "tokenize", str(tmp_path / "a.jsonl"), "--out", str(tmp_path)]
    said = CliRunner().invoke(app, [*words, "--tokenizer", str(chat)]).output
    assert said.count("the end of a turn in a chat") == 1
