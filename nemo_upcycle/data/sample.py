"""Make a small two-source text corpus from Python's own standard library.

Every machine that runs this package has the text already, so a demonstration needs no download.
The two sources differ clearly (English prose and program code) and share no docstring.
"""

from __future__ import annotations

import ast
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable, scratch_directory

MIN_CHARACTERS = 200
"""Minimum length of a document; shorter documents are stubs."""

# Tests are not library text. `pydoc_data` is documentation written as Python, and `encodings`
# holds a hundred nearly identical generated character tables.
_EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}
)
# The build configuration contains paths and compiler flags of the machine that built Python.
_EXCLUDED_MODULE_PREFIXES = ("_sysconfigdata",)

_DocstringOwner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_DOCSTRING_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _SourceModule:
    """A parsed module: dotted name, source text and syntax tree."""

    name: str
    source: str
    tree: ast.Module


def write_stdlib_sample(out: Path, *, stdlib: Path | None = None) -> dict[str, Path]:
    """Write `documentation.jsonl` and `sources.jsonl` from the standard library's files.

    Each line is `{"text": ..., "id": ...}`, ordered by id. The same interpreter always gives the
    same bytes.

    Args:
        out: Output directory, created if missing.
        stdlib: Standard library directory; None means that of the running interpreter.

    Returns:
        The two files, under the keys `documentation` and `sources`.

    Raises:
        UpcyclingError: There are no standard library sources (zipped or frozen Python).
    """
    check_writable(out)
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    modules = list(_parsed_modules(root))
    if not modules:
        raise UpcyclingError(_missing_sources_message(root))
    corpora = {
        "documentation": [*_topic_documents(), *_docstring_documents(modules)],
        "sources": [(f"source:{m.name}", remove_docstrings(m.source, m.tree)) for m in modules],
    }
    return write_corpora(out, corpora)


def remove_docstrings(source: str, tree: ast.Module | None = None) -> str:
    r"""Return Python source without docstrings, still valid and otherwise unchanged.

    Args:
        source: Python source with `\n` line ends.
        tree: Syntax tree of exactly this source; None parses the source.

    Raises:
        SyntaxError: No tree is given and the source does not parse.
    """
    lines = source.split("\n")
    owners = [node for node in ast.walk(tree or ast.parse(source)) if _has_docstring(node)]
    # From the end backwards, so that the remaining positions stay valid.
    for owner in sorted(owners, key=lambda node: node.body[0].lineno, reverse=True):
        _remove_statement(lines, owner.body[0], only_statement=len(owner.body) == 1)
    return "\n".join(lines)


def _remove_statement(lines: list[str], statement: ast.stmt, *, only_statement: bool) -> None:
    """Remove one docstring statement from the lines, in place."""
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    # The tree counts columns in UTF-8 bytes.
    before = lines[first].encode()[: statement.col_offset].decode()
    after = lines[last].encode()[statement.end_col_offset :].decode()
    alone = not before.strip() and (not after.strip() or after.lstrip().startswith("#"))
    if not alone or (only_statement and before):
        # A statement is needed: the body would be empty, or other code shares the line.
        lines[first : last + 1] = [f"{before}pass{after}"]
    elif after.strip():
        lines[first : last + 1] = [before + after.lstrip()]
    else:
        del lines[first : last + 1]


def _has_docstring(node: ast.AST) -> TypeGuard[_DocstringOwner]:
    """Return whether the node is a module, class or function with a docstring."""
    return isinstance(node, _DOCSTRING_OWNERS) and ast.get_docstring(node, False) is not None


def _parsed_modules(root: Path) -> Iterator[_SourceModule]:
    """Yield the library's modules ordered by name, without modules that do not parse."""
    for name, path in sorted(_module_files(root)):
        try:
            with tokenize.open(path) as file:  # honors the coding line
                source = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # outdated escapes in third-party code
                yield _SourceModule(name, source, ast.parse(source))
        except (SyntaxError, ValueError):  # ValueError: undecodable, or a null byte
            continue


def _module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted module name, file) of every eligible module below the directory."""
    for directory, subdirectories, files in os.walk(root):
        # Directories that are not identifiers are not packages: site-packages, config-3.x-...
        subdirectories[:] = [
            d for d in subdirectories if d.isidentifier() and d not in _EXCLUDED_DIRECTORIES
        ]
        package = Path(directory).relative_to(root).parts
        for file in files:
            stem, extension = os.path.splitext(file)
            if extension != ".py" or not stem.isidentifier():
                continue
            if stem.startswith(_EXCLUDED_MODULE_PREFIXES):
                continue
            parts = package if stem == "__init__" and package else (*package, stem)
            yield ".".join(parts), Path(directory, file)


def _topic_documents() -> Iterator[tuple[str, str]]:
    """Yield (id, text) of the language reference topics that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package topics separately; docstrings are enough
        return
    for name in sorted(topics):
        yield f"topic:{name}", topics[name]


def _docstring_documents(modules: Iterable[_SourceModule]) -> Iterator[tuple[str, str]]:
    """Yield (id, text), one document per module with all its docstrings."""
    for module in modules:
        docstrings = _docstrings(module.tree, module.name)
        text = "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in docstrings)
        yield f"module:{module.name}", text


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of the node and all descendants, in file order."""
    if isinstance(node, _DOCSTRING_OWNERS) and (docstring := ast.get_docstring(node)):
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif not isinstance(child, ast.expr):  # definitions may be nested in if and try
            yield from _docstrings(child, name)


def write_corpora(out: Path, corpora: Mapping[str, Iterable[tuple[str, str]]]) -> dict[str, Path]:
    """Write one JSONL file per corpus; either all files appear or none."""
    with scratch_directory(out, "sample") as temporary:
        for name, documents in corpora.items():
            _write_jsonl(temporary / name, documents)
        paths = {name: out / f"{name}.jsonl" for name in corpora}
        for name, path in paths.items():
            os.replace(temporary / name, path)
    return paths


def _write_jsonl(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    """Write the (id, text) documents that are long enough, one JSON object per line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for identifier, text in documents:
            # Some docstrings contain lone surrogates, which UTF-8 cannot encode.
            text = text.encode("utf-8", "backslashreplace").decode().strip()
            if len(text) >= MIN_CHARACTERS:
                line = json.dumps({"text": text, "id": identifier}, ensure_ascii=False)
                file.write(line + "\n")


def _missing_sources_message(root: Path) -> str:
    """Return an error message: what was found, what was expected and what to do."""
    problem = "a directory without usable .py files" if root.is_dir() else "no such directory"
    return (
        f"the sample corpus needs the Python sources of the standard library: found {problem} at "
        f"{root}, expected files such as {root / 'os.py'}. A zipped, frozen or stripped Python "
        "does not have them: use a regular CPython installation, or bring your own JSONL files "
        'with a "text" field.'
    )
