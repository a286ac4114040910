"""What commands and recipes make of a blend."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import documents_in, expected_documents


def test_the_command_prepares_it(tokenizer: Path, blend: Path) -> None:
    words = ["data", "blend", str(blend), "--tokenizer", str(tokenizer), "--workers", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    prepared = blend.parent / "prepared"
    assert f"data_paths='0.7 {prepared}/redpajama_v2 0.2 {prepared}/boolq" in result.output
    tokens = len(expected_documents(tokenizer, ["kept"])[0])
    assert f"reads redpajama_v2 the most often: once every {int(tokens / 0.7)} t" in result.output
    texts = {
        "redpajama_v2": "kept",
        "boolq": "P\nQuestion: q?\nAnswer: yes",
        "openbookqa": "The sun is a star",
    }
    for name, text in texts.items():
        assert documents_in(prepared / name) == expected_documents(tokenizer, [text])


def test_the_recipe_takes_it(blend: Path) -> None:
    from nemo_upcycle_recipes.llama_tiny import upcycled_recipe
    from nemo_upcycle_recipes.upcycled import FACTORIES

    prepared = blend.parent / "prepared"
    words = ["0.7", f"{prepared}/redpajama_v2", "0.2", f"{prepared}/boolq", "0.1",
             f"{prepared}/openbookqa"]  # fmt: skip
    for recipe in (FACTORIES["llama3_8b_e8t2"], upcycled_recipe):
        assert recipe(data_blend=str(blend)).data.paths == words
    with pytest.raises(UpcyclingError, match="Both data_paths and data_blend are given"):
        FACTORIES["llama3_8b_e8t2"](data_blend=str(blend), data_paths="a")
