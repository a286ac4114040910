"""Which cases of a test belong to every change: the rest are for `make test-thorough`.

`make test` proves each thing once. `make test-thorough` repeats that over all mappings, kinds of
models and accidents; CI runs both.
"""

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(case: Any) -> Any:
    """Leave a case of `parametrize` to `make test-thorough`."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.thorough)


def thorough_but(names: Iterable[str], *often: str) -> list[Any]:
    """Leave all named cases but a few to `make test-thorough`."""
    names = list(names)
    assert set(often) <= set(names)
    return [name if name in often else thorough(name) for name in names]
