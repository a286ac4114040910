"""The sample corpus of the whole standard library."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from nemo_upcycle.data.sample import MIN_CHARACTERS, write_stdlib_sample

# The first line of textwrap.TextWrapper's docstring.
KNOWN_DOCSTRING = "Object for wrapping/filling text."


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_stdlib_sample(tmp_path_factory.mktemp("sample"))


def read(path: Path) -> dict[str, str]:
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    texts = {document["id"]: document["text"] for document in documents}
    assert len(texts) == len(documents), "ids are unique"
    return texts


def test_sample_is_large_enough_to_train_on(sample: dict[str, Path]) -> None:
    assert sample["documentation"].stat().st_size > 1_000_000
    assert sample["sources"].stat().st_size > 4_000_000
    assert all(
        len(text) >= MIN_CHARACTERS for path in sample.values() for text in read(path).values()
    )


def test_docstrings_are_in_the_documentation_only(sample: dict[str, Path]) -> None:
    documentation, sources = read(sample["documentation"]), read(sample["sources"])
    assert KNOWN_DOCSTRING in documentation["module:textwrap"]
    assert "class TextWrapper" in sources["source:textwrap"]
    assert not any(KNOWN_DOCSTRING in text for text in sources.values())
    assert "assert_stmt" in documentation["topic:assert"]
    assert not any("assert_stmt ::=" in text for text in sources.values())


def test_sources_still_parse_and_have_no_docstring(sample: dict[str, Path]) -> None:
    owners = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for name, source in list(read(sample["sources"]).items())[::7]:
        tree = ast.parse(source)
        left = [n for n in ast.walk(tree) if isinstance(n, owners) and ast.get_docstring(n)]
        assert not left, name


def test_tests_and_build_configuration_are_left_out(sample: dict[str, Path]) -> None:
    parts = {part for name in read(sample["sources"]) for part in name.split(":")[1].split(".")}
    assert {"json", "textwrap", "asyncio"} <= parts
    assert not parts & {"test", "tests", "idle_test", "pip", "encodings"}
    assert not [part for part in parts if part.startswith("_sysconfigdata")]
