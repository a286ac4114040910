"""What keeps the unit tests quick can fail."""

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")
MODULES = ["nemo", "nemo_run", "lightning", "megatron"]
TESTS = f"""
import sys, pytest
def test_before(): pass
@pytest.mark.parametrize("module", {MODULES})
def test_guilty(module): sys.modules[module] = sys
def test_after(): pass
"""


def outcome(directory: Path, tests: str) -> str:
    """Run tests under the conftest of the unit tests; return what pytest says."""
    (directory / "conftest.py").write_text(CONFTEST.read_text())
    (directory / "test_it.py").write_text(tests)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(directory)]
    return subprocess.run(words, cwd=directory, capture_output=True, text=True).stdout


def test_an_import_is_blamed_on_the_test_that_did_it(tmp_path: Path) -> None:
    said = outcome(tmp_path, TESTS)
    for module in MODULES:
        assert f"imported {module}; move this test" in said
        assert f"ERROR test_it.py::test_guilty[{module}]" in said
    assert "6 passed, 4 errors" in said


def test_an_import_at_collection_is_seen(tmp_path: Path) -> None:
    said = outcome(tmp_path, 'import sys\nsys.modules["nemo"] = sys\ndef test_it(): pass\n')
    assert "imported nemo; move this test" in said
