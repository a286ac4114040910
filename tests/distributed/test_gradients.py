"""One step's loss and gradients on several ranks equal one rank's."""

import pytest

from tests.distributed.foldings import NAMES
from tests.distributed.grid import Grid

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_one_rank(grid: Grid, name: str) -> None:
    assert grid.run(name).loss == pytest.approx(grid.one_rank(name).loss, rel=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_norm_equals_one_rank(grid: Grid, name: str) -> None:
    """Also as Megatron's optimizer counts it, on each rank by what it owns, to clip by it."""
    shown, expected = grid.run(name), grid.one_rank(name).grad_norm
    assert shown.grad_norm == pytest.approx(expected, rel=TOLERANCE)
    assert shown.clip_norms == pytest.approx([expected] * len(shown.clip_norms), rel=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_one_rank(grid: Grid, name: str) -> None:
    gradients = grid.run(name).gradients
    expected = grid.one_rank(name).gradients.parameters
    assert not gradients.problems
    assert gradients.parameters.keys() == expected.keys()
    for key, gradient in gradients.parameters.items():
        scale = float(expected[key].abs().max())
        assert scale > 0, key
        error = float((gradient - expected[key]).abs().max()) / scale
        assert error < TOLERANCE, key
