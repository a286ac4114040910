"""Pictures that cannot be written."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app


@pytest.mark.parametrize(
    "words",
    [
        ["groups", "--world-size", "512", "--out"],
        ["tune", "--scaling"],
        ["worth", "--dense", "DIR", "--dense-tokens", "1B", "--tokens", "1B", "--out"],
    ],
    ids=["groups", "tune", "worth"],
)
def test_a_picture_that_cannot_be_written_is_one_line_before_the_work(
    tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_text("")
    wrong = {
        "a": "expected .png, .svg, .pdf",
        "a.tiff": "expected .png, .svg, .pdf",
        "a.png": "is a directory; expected a file to write",
        "file/a.png": "cannot be written to",
    }
    for name, message in wrong.items():
        result = CliRunner().invoke(app, [*words, str(tmp_path / name)])
        assert result.exit_code == 1
        said = " ".join(result.output.split())
        assert said.startswith("Error: ")
        assert message in said
