"""docs/faults.md is true: its tests exist, and what it quotes is what they expect."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if line.startswith("| ") and "::" in line
]


def test_the_table_is_long() -> None:
    assert len(ROWS) >= 110


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row(row: list[str]) -> None:
    tests = re.findall(r"`(tests/[^`]+)`", row[-1].strip("| "))
    assert tests
    sources = ""
    for test in tests:
        path, function, case = re.fullmatch(r"([^:]+)::(\w+)(?:\[(.+)\])?", test).groups()
        source = (ROOT / path).read_text()
        assert f"def {function}(" in source, test
        assert case is None or f'"{case}"' in source, test
        sources += source
    for quoted in re.findall(r"`([^`]+)`", row[1]):
        assert quoted in sources, f"{tests} does not expect {quoted!r}"
