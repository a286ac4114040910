"""The sample corpus: what is in it, what is not, and that it is whole or absent."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from nemo_upcycle.data.sample import remove_docstrings, write_stdlib_sample
from nemo_upcycle.errors import UpcyclingError

# The first line of textwrap.TextWrapper's docstring.
KNOWN_DOCSTRING = "Object for wrapping/filling text."
PROSE = "This long docstring tells nothing at all, again and again. " * 8


def read(path: Path) -> dict[str, str]:
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    texts = {document["id"]: document["text"] for document in documents}
    assert len(texts) == len(documents), "ids are unique"
    return texts


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
