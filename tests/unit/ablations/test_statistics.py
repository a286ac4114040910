"""Means, their errors and verdicts."""

import math

import pytest

from nemo_upcycle.ablations.statistics import Estimate, t_quantile, verdict


class TestStatistics:
    @pytest.mark.parametrize(
        ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (30, 2.042)]
    )
    def test_student(self, freedom: int, expected: float) -> None:
        assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)

    def test_mean_and_standard_error(self) -> None:
        found = Estimate.of([1.0, 2.0, 3.0])
        assert (found.mean, found.seeds) == (2.0, 3)
        assert found.error == pytest.approx(1 / math.sqrt(3))
        low, high = found.interval
        assert high - 2.0 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
        assert low + high == pytest.approx(4.0)

    @pytest.mark.parametrize(
        ("differences", "expected"),
        [
            ([0.1, 0.11, 0.12], "holds"),
            ([-0.1, -0.11, -0.12], "does not hold: the opposite does"),
            ([0.1, -0.11, 0.12], "cannot be told with 3 seeds"),
            ([0.1, 0.3, 0.5], "cannot be told with 3 seeds"),  # beyond 2 standard errors
            ([0.0, 0.0], "does not hold: there is no difference"),
            ([2e-7, 2e-7], "does not hold: there is no difference"),  # what rounding makes
            ([0.1], "cannot be told with 1 seed"),
        ],
    )
    def test_verdict(self, differences: list[float], expected: str) -> None:
        assert verdict(Estimate.of(differences)) == expected
