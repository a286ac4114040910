"""Unit tests need one process and neither NeMo, NeMo-Run, Lightning nor Megatron-Core."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ELSEWHERE = {"nemo", "nemo_run", "lightning", "megatron"}
"""What takes seconds to import; its tests are in tests/integration."""


def imported() -> set[str]:
    return ELSEWHERE & sys.modules.keys()


@pytest.fixture(scope="session")
def excused(request: pytest.FixtureRequest) -> set[str]:
    """All of it where tests of other directories run in the same session, before or between."""
    here = Path(__file__).parent
    alone = all(here in item.path.parents for item in request.session.items)
    return set() if alone else set(ELSEWHERE)


@pytest.fixture(autouse=True)
def _nothing_heavy_is_imported(excused: set[str]) -> Iterator[None]:
    yield
    found = imported() - excused
    excused |= found  # the other tests are not to blame
    assert not found, f"imported {', '.join(sorted(found))}; move this test to tests/integration"
