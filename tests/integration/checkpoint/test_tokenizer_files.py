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
from tests.tokenizers import write_tokenizer

KILLED = """
import os, sys
from pathlib import Path
from nemo_upcycle.checkpoint.tokenizer_files import load_alone
load_alone(Path(sys.argv[1]))
os._exit(1)
"""


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
