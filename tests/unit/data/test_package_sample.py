"""The corpus of installed packages: each text once, in an order that depends on texts alone."""

import hashlib
import json
from pathlib import Path

import pytest

from nemo_upcycle.data.package_sample import MAX_BYTES, write_package_sample
from nemo_upcycle.errors import UpcyclingError

CODE = "".join(f"value_{i} = {i}\n" for i in range(30))
PROSE = "A package is described here, at some length. " * 8


def read(path: Path) -> dict[str, str]:
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {document["id"]: document["text"] for document in documents}


def write(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "site"
    for number in range(6):
        write(root, f"pkg/module{number}.py", f"# {number}\n{CODE}")
    write(root, "pkg/README.md", PROSE)
    write(root, "pkg-1.0.dist-info/METADATA", f"Name: pkg\n{PROSE}")
    write(root, "vendored/module0.py", f"# 0\n{CODE}\n\n")  # the same text
    write(root, "pkg-1.0.dist-info/LICENSE.txt", PROSE + "A licence.")
    write(root, "pkg/__pycache__/left.py", CODE)
    write(root, "pkg/short.py", "x = 1\n")
    write(root, "pkg/latin.py", b"name = '\xff'\n" + CODE.encode())
    write(root, "pkg/table.py", "0,\n" * (MAX_BYTES // 3 + 1))
    write(root, "pkg/library.so", CODE)
    return root


def test_each_text_is_one_document_of_its_kind(root: Path, tmp_path: Path) -> None:
    paths = write_package_sample(tmp_path / "out", roots=[root, root / "pkg"])
    sources = read(paths["sources"])
    assert set(sources) == {f"sources:pkg/module{number}.py" for number in range(6)}
    assert read(paths["documentation"]) == {
        "documentation:pkg/README.md": PROSE.strip(),
        "documentation:pkg-1.0.dist-info/METADATA": f"Name: pkg\n{PROSE}".strip(),
    }
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in sources.values()]
    assert hashes == sorted(hashes)


def test_the_order_does_not_depend_on_names(root: Path, tmp_path: Path) -> None:
    first = read(write_package_sample(tmp_path / "1", roots=[root])["sources"])
    (root / "pkg").rename(root / "another")
    second = read(write_package_sample(tmp_path / "2", roots=[root])["sources"])
    assert list(first.values()) == list(second.values())


def test_no_packages_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"no documentation of packages in .*expected files"):
        write_package_sample(tmp_path / "out", roots=[tmp_path])
    assert not list(tmp_path.glob("out/*"))
