"""`nemo-upcycle check` as a user starts it; tests/distributed/test_check.py has its checks."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end import cli


def run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = cli.command("nemo-upcycle", "check", *options)
    return subprocess.run(
        words, cwd=directory, env=cli.environment(), capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "There is no GPU; give --cpu to check on CPU, over gloo."),
        (("--cpu", "--dtype", "float16"), "--dtype is float16; expected float32 or bfloat16."),
        (("--cpu", "--ranks", "0"), "--ranks is 0; expected 1 or more."),
        (("--cpu", "--hardware", "h7"), "There is no hardware 'h7'; expected one of: a100"),
    ],
)
def test_bad_options_end_in_one_line(
    tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    import torch

    if torch.cuda.is_available() and not options:
        pytest.skip("there is a GPU")
    done = run(tmp_path, *options)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {expected}")
    assert len(done.stderr.splitlines()) == 1


def test_a_model_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--cpu", "--ranks", "1", "--dense", "nowhere")
    assert done.returncode == 1
    assert "Error: " in done.stderr and "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    done = run(tmp_path, "--cpu", "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["passed"] and outcome["ranks"] == 2
    assert outcome == json.loads((tmp_path / "check" / "check.json").read_text())
    assert len(done.stderr.splitlines()) == len(outcome["findings"])
