"""The sample corpus: what is in it, what is not, and that it is whole or absent."""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path

import pytest

from nemo_upcycle.data.sample import MIN_CHARACTERS, remove_docstrings, write_stdlib_sample
from nemo_upcycle.errors import UpcyclingError

# The first line of textwrap.TextWrapper's docstring.
KNOWN_DOCSTRING = "Object for wrapping/filling text."
PROSE = "This long docstring tells nothing at all, again and again. " * 8


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


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    code = f'"""Module. {PROSE}"""\n' + "".join(f"value_{i} = {i}\n" for i in range(30))
    for name in ("b.py", "a.py", "pkg/__init__.py", "pkg/mod.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code, encoding="utf-8")
    for name in ("test/t.py", "pkg/tests/t.py", "site-packages/s.py", "pkg/__pycache__/p.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code, encoding="utf-8")
    (root / "broken.py").write_text("def (:\n" + "#" * 500)
    (root / "undecodable.py").write_bytes(b'text = "\xff"\n' + b"#" * 500)
    (root / "short.py").write_text('"""Short."""\nx = 1\n')
    (root / "surrogate.py").write_text(f'"""A lone \\ud800. {PROSE}"""\n')
    return root


def test_modules_are_in_order_and_unusable_files_left_out(library: Path, tmp_path: Path) -> None:
    paths = write_stdlib_sample(tmp_path / "out", stdlib=library)
    assert list(read(paths["sources"])) == [f"source:{n}" for n in ("a", "b", "pkg", "pkg.mod")]
    modules = [name for name in read(paths["documentation"]) if name.startswith("module:")]
    assert modules == [f"module:{n}" for n in ("a", "b", "pkg", "pkg.mod", "surrogate")]
    assert r"A lone \ud800." in read(paths["documentation"])["module:surrogate"]


def test_the_same_library_gives_the_same_bytes(library: Path, tmp_path: Path) -> None:
    first = write_stdlib_sample(tmp_path / "1", stdlib=library)
    second = write_stdlib_sample(tmp_path / "2", stdlib=library)
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes()
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == [
        "documentation.jsonl",
        "sources.jsonl",
    ]


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_missing_library_is_one_clear_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpcyclingError, match=r"found .* at .*expected .*os\.py.*use a regular"):
        write_stdlib_sample(tmp_path / "out", stdlib=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_remove_docstrings_keeps_everything_else() -> None:
    source = textwrap.dedent('''\
        """Module: ünïcode
        over two lines."""  # kept
        from __future__ import annotations
        def only(): "docstring"
        class Empty:
            """Docstring."""
        class Full:
            ("par" "enthesised")

            text = """not a docstring"""
            async def method(self):
                r"""One."""; x = "ü"; """not one"""
                return x
        if True:
            def nested():
                """Nested
        text at the margin."""
                """also not one"""
        ''')
    expected = textwrap.dedent('''\
        # kept
        from __future__ import annotations
        def only(): pass
        class Empty:
            pass
        class Full:

            text = """not a docstring"""
            async def method(self):
                pass; x = "ü"; """not one"""
                return x
        if True:
            def nested():
                """also not one"""
        ''')
    assert remove_docstrings(source) == expected
    compile(expected, "expected", "exec")
